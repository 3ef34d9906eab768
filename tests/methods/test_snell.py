"""SNELL against its equations; conformance, memory and the numbers of the update are tested elsewhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, normal, quick_at
from tiny_models import moved

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core.errors import PeftError

L, N, M = 3, 12, 8
STACK = normal(KEY, (L, N, M))
PARAMS = {"blocks": {"up": {"kernel": STACK}}, "down": {"kernel": STACK[0].T}}
X = normal(jax.random.key(1), (5, N))


def forward(params, x):
    h = sum(jnp.tanh(x @ params["blocks"]["up"]["kernel"][n]) for n in range(L))
    return h @ params["down"]["kernel"]


def trained(method, params=PARAMS):
    frozen, trainable = method.init(KEY, params)
    return frozen, moved(trainable)


def update(method, frozen, trainable, name="up"):
    """What the method adds to a weight, `[*stack, n, m]`."""
    merged = method.merge(frozen, trainable)
    now, base = (p["blocks"]["up"] if name == "up" else p["down"] for p in (merged, PARAMS))
    return now["kernel"] - base["kernel"]


def distances(slots):
    """`[*stack, P, n, m]`, in float64."""
    a, b = np.float64(slots["a"]), np.float64(slots["b"])
    return np.sqrt(np.square(a[..., :, :, None] - b[..., :, None, :]).sum(-3))


def dw(slots, coefficient):
    d = distances(slots)
    return sum(coefficient * (-1) ** p * d[..., p, :, :] for p in range(d.shape[-3]))


# The update.


@pytest.mark.parametrize(
    ("mode", "keep"),
    [
        ("released", lambda size, t: size * (size > t)),
        ("paper", lambda size, t: np.maximum(size - t, 0)),
        ("hard", lambda size, t: 1.0 * (size > t)),
    ],
)
def test_each_mode_is_its_equation_with_a_threshold_for_each_matrix(mode, keep):
    method = pj.snell(rank=6, heads=3, sparsity=0.4, coefficient=2.0, mode=mode)
    frozen, trainable = trained(method)
    full = dw(trainable["blocks/up/kernel"], 2.0)
    size = np.abs(full)
    at_paper = math.ceil(0.4 * N * M) - 1
    t = np.sort(size.reshape(L, -1))[:, at_paper] if mode == "paper" else np.quantile(size, 0.4, axis=(1, 2))
    assert_close(update(method, frozen, trainable), jnp.asarray(full * keep(size, t[:, None, None])), 1e-5)


def test_the_share_of_zeros_is_the_sparsity():
    method = pj.snell(rank=4, sparsity={"up": 0.9, "down": 0.5}, coefficient=3.0)
    frozen, trainable = trained(method)
    for name, share in (("up", 0.9), ("down", 0.5)):
        kept = (update(method, frozen, trainable, name) != 0).sum((-2, -1))
        np.testing.assert_array_equal(kept, N * M - math.floor(share * (N * M - 1)) - 1)


def test_factors_start_as_the_authors_do():
    params = {"up": {"kernel": jnp.zeros((2, 400, 100))}}
    _, trainable = pj.snell(rank=8, heads=2).init(KEY, params)
    a, b = (trainable["up/kernel"][name] for name in "ab")
    assert (a.shape, b.shape) == ((2, 2, 4, 400), (2, 2, 4, 100))
    for factor, size in ((a, 400), (b, 100)):
        bound = 1 / math.sqrt(4 * size)
        assert 0.98 * bound < float(jnp.abs(factor).max()) <= bound
        np.testing.assert_allclose(factor.std(), bound / math.sqrt(3), rtol=0.05)
    assert not np.array_equal(a[0], a[1])


def test_the_start_is_near_the_base_and_of_high_rank():
    params = {"up": {"kernel": jnp.zeros((96, 96))}}
    method = pj.snell(rank=8, sparsity=0.0)
    made = np.asarray(method.merge(*method.init(KEY, params))["up"]["kernel"])
    assert 0 < np.abs(made).max() < 0.02
    singular = np.linalg.svd(made, compute_uv=False)
    assert (singular > 1e-3 * singular[0]).sum() > 60


@pytest.mark.slow
def test_the_linear_kernel_without_sparsifier_is_lora():
    snell = pj.snell(rank=3, heads=1, sparsity=0.0, kernel="linear", coefficient=1.0)
    lora = pj.lora(rank=3, alpha=3.0)
    frozen, trainable = trained(snell)
    same = jax.tree.map(lambda factor: factor[..., 0, :, :], trainable)

    def loss(method, frozen, trainable):
        out = pj.adapt(forward)(method.apply(frozen, trainable), X)
        return jnp.sum(jnp.sin(out)), out

    (_, got), grads = jax.value_and_grad(lambda t: loss(snell, frozen, t), has_aux=True)(trainable)
    base = lora.init(KEY, PARAMS)[0]
    (_, want), wanted = jax.value_and_grad(lambda t: loss(lora, base, t), has_aux=True)(same)
    assert_close(got, want)
    assert_close(jax.tree.map(lambda factor: factor[..., 0, :, :], grads), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sigmoid", "rbf"])
@pytest.mark.parametrize("heads", [1, 2])
def test_kernels_with_scalars_start_at_zero_for_factors_of_zero_and_train_them(kernel, heads):
    method = pj.snell(rank=2, heads=heads, sparsity=0.3, kernel=kernel, coefficient=1.0)
    frozen, trainable = method.init(KEY, PARAMS)
    assert {*trainable["down/kernel"]} == {"a", "b", "scale", "rate", "shift"}
    none = {path: {**slots, "a": 0 * slots["a"], "b": 0 * slots["b"]} for path, slots in trainable.items()}
    assert float(jnp.abs(update(method, frozen, none)).max()) == 0
    grads = jax.grad(lambda t: jnp.sum(jnp.sin(forward(method.merge(frozen, t), X))))(moved(trainable))
    assert all(float(jnp.abs(grads["down/kernel"][name]).max()) > 0 for name in ("a", "b", "scale", "rate"))
    # The shifts of heads of opposite sign cancel.
    assert (float(jnp.abs(grads["down/kernel"]["shift"])) > 0) == (heads == 1)


# Sparsity.


def test_another_sparsity_compiles_nothing_and_prunes_another_share():
    method = pj.snell(rank=2, sparsity=0.3, coefficient=3.0)
    frozen, trainable = trained(method)
    merge = jax.jit(method.merge)
    zeros = []
    for share in (0.3, 0.6, 0.8):
        merged = merge(pj.set_sparsity(frozen, share), trainable)
        zeros.append(int((merged["blocks"]["up"]["kernel"] == STACK).sum()))
    assert merge._cache_size() == 1
    np.testing.assert_array_equal(zeros, [L * (math.floor(s * (N * M - 1)) + 1) for s in (0.3, 0.6, 0.8)])


def test_sparsity_by_pattern_inside_a_chain_leaves_the_rest_alone():
    method = pj.chain(pj.lora(rank=1, targets=["down"]), pj.snell(rank=2, sparsity=0.3))
    frozen, _ = method.init(KEY, PARAMS)
    changed = pj.set_sparsity(frozen, {"up": 0.5})
    np.testing.assert_array_equal(changed.state["snell"]["blocks/up/kernel"]["sparsity"], [0.5] * L)
    assert float(changed.state["snell"]["down/kernel"]["sparsity"]) == np.float32(0.3)
    assert float(frozen.state["snell"]["blocks/up/kernel"]["sparsity"][0]) == np.float32(0.3)


def test_no_sparsifier_and_a_level_of_zero_are_different_models():
    without = pj.snell(rank=2, sparsity=0.0, coefficient=2.0)
    frozen, trainable = trained(without)
    full = dw(trainable["blocks/up/kernel"], 2.0)
    assert_close(update(without, frozen, trainable), jnp.asarray(full))
    method = pj.snell(rank=2, sparsity=0.3, coefficient=2.0)
    frozen = pj.set_sparsity(method.init(KEY, PARAMS)[0], 0.0)
    smallest = np.abs(full).min((1, 2), keepdims=True)
    wanted = full * np.abs(full) * (np.abs(full) > smallest)
    assert_close(update(method, frozen, trainable), jnp.asarray(wanted))


ERRORS = [
    (lambda: pj.snell(sparsity=1.0), r"snell: sparsity must be in \[0, 1\), got 1.0"),
    (lambda: pj.snell(mode="soft"), "snell: mode must be one of released, paper, hard, got 'soft'"),
    (
        lambda: pj.snell(kernel="square"),
        "snell: kernel must be one of distance, linear, sigmoid, rbf, got 'square'",
    ),
    (lambda: pj.snell(heads=0), "snell: heads must be positive, got 0"),
    (lambda: pj.snell(dropout=1.0), r"snell: dropout must be in \[0, 1\), got 1.0"),
    (lambda: trained(pj.snell(rank=3)), "rank 3 of 'blocks/up/kernel' does not split into 2 heads"),
    (lambda: trained(pj.snell(rank=10)), "snell: rank 10 is larger than 'blocks/up/kernel'"),
    (lambda: trained(pj.snell(sparsity={"up": 0.5})), "no pattern of sparsity matches 'down/kernel'"),
    (lambda: trained(pj.snell(sparsity={"up|down": 0.5, "q": 0.1})), "pattern 'q' matched no target"),
    (lambda: trained(pj.snell(layers=[3])), "snell: no target lies in layer 3"),
    (lambda: pj.set_sparsity(trained(pj.snell())[0], 1.5), r"set_sparsity: sparsity must be in \[0, 1\)"),
    (lambda: pj.set_sparsity(trained(pj.snell())[0], {"q": 0.5}), "pattern 'q' matched no target"),
    (lambda: pj.set_sparsity(trained(pj.snell(sparsity=0.0))[0], 0.5), "no weight has a sparsifier"),
    (lambda: pj.set_sparsity(trained(pj.lora())[0], 0.5), "no weight has a sparsifier"),
]


@pytest.mark.parametrize(("make", "text"), ERRORS, ids=[text for _, text in ERRORS])
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises(PeftError, match=text):
        make()


# Layers and views.


@pytest.mark.parametrize("kernel", quick_at(["distance", "linear", "sigmoid", "rbf"], 0, 2))
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_layers_that_are_not_trained_keep_their_base(kernel, sparsity):
    method = pj.snell(rank=2, kernel=kernel, sparsity=sparsity, coefficient=2.0, layers=[0, 2])
    frozen, trainable = trained(method)
    assert {slots["a"].shape[0] for slots in trainable.values()} == {2}
    change = jnp.abs(update(method, frozen, trainable)).max((1, 2))
    assert change[1] == 0
    assert float(change[0]) > 1e-3
    assert float(change[2]) > 1e-3


def test_slices_of_inputs_and_outputs_are_those_of_the_merged_weight():
    def sliced(params, x):
        w = params["down"]["kernel"]
        return x[:, :5] @ w[:5, 3:] + x @ w[:, :9]

    method = pj.snell(rank=2, sparsity=0.3, coefficient=2.0, targets=["down"])
    frozen, trainable = trained(method)
    got = pj.adapt(sliced)(method.apply(frozen, trainable), X[:, :M])
    assert_close(got, sliced(method.merge(frozen, trainable), X[:, :M]))


# Precision, dropout, files, devices.


@pytest.mark.slow
def test_a_bfloat16_layer_feels_updates_smaller_than_its_weights_resolution():
    params = {"up": {"kernel": jnp.full((N, M), 1.5, jnp.bfloat16)}}  # the next numbers are 1/128 away
    method = pj.snell(rank=4, sparsity=0.3, coefficient=0.04)
    frozen, trainable = trained(method, params)
    weight = method.apply(frozen, trainable)["up"]["kernel"]
    assert 0 < float(jnp.abs(weight.delta()).max()) < 1 / 512
    assert bool((weight.dense() == 1.5).all())
    x = jnp.zeros((2, N), jnp.bfloat16).at[0, :2].set(jnp.array([1, -1])).at[1, 5:7].set(jnp.array([-2, 2]))
    assert_close(1e3 * pj.matmul(x, weight), 1e3 * np.float32(x) @ weight.delta(), 1e-2)


def test_dropout_is_on_the_updates_input_and_needs_a_key():
    method = pj.snell(rank=2, sparsity=0.3, coefficient=2.0, dropout=0.5, targets=["down"])
    frozen, trainable = trained(method)
    x, base = X[:, :M], PARAMS["down"]["kernel"]
    weight = method.apply(frozen, trainable, key=KEY)["down"]["kernel"]
    added = pj.matmul(x, weight) - x @ base
    inputs = added @ jnp.linalg.pinv(weight.delta())  # 12 outputs tell the 8 inputs
    ratio = inputs / x
    assert_close(ratio, jnp.where(ratio > 1, 2.0, 0.0), 1e-2)
    assert 0.2 < float((ratio > 1).mean()) < 0.8
    assert_close(pj.matmul(x, weight), x @ base + added, 0)
    plain = method.apply(frozen, trainable)["down"]["kernel"]
    assert_close(pj.matmul(x, plain), x @ (base + plain.delta()))


@pytest.mark.slow
def test_a_base_of_another_method_keeps_its_own_product():
    method = pj.chain(pj.lora(rank=2), pj.snell(rank=2, sparsity=0.3, coefficient=2.0))
    frozen, trainable = trained(method)
    got = pj.adapt(forward)(method.apply(frozen, trainable), X)
    assert_close(got, forward(method.merge(frozen, trainable), X))


def test_a_saved_adapter_comes_back_with_its_sparsity(tmp_path):
    method = pj.snell(rank=2, sparsity={"up": 0.3, "down": 0.0}, coefficient=2.0)
    frozen, trainable = method.init(jax.random.key(3), PARAMS)
    frozen, trainable = pj.set_sparsity(frozen, 0.7), moved(trainable)
    save_adapter(tmp_path, method, frozen, trainable, seed=3)
    loaded = load_adapter(tmp_path, PARAMS)
    assert_close(loaded.method.merge(loaded.frozen, loaded.trainable), method.merge(frozen, trainable), 0)
    np.testing.assert_allclose(loaded.frozen.state["blocks/up/kernel"]["sparsity"], 0.7)
