"""The low-rank methods against their equations: counts, starts, scales, filters, biases and geometry."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from support import KEY, assert_close, assert_equals_merged, normal, quick_at
from tiny_models import moved

import peftjax as pj
from peftjax.core import tree

N_IN, N_OUT = 12, 8
W = normal(KEY, (N_IN, N_OUT))
X = normal(jax.random.key(1), (5, N_IN))
LAYER = {"up": {"kernel": W, "bias": jnp.ones(N_OUT)}}
WEIGHT = "up/kernel"


def linear(params, x):
    return x @ params["up"]["kernel"] + params["up"]["bias"]


def started(method, params=LAYER):
    frozen, trainable = method.init(KEY, params)
    return frozen, trainable


def delta_of(method, trainable=None, params=LAYER, path=WEIGHT):
    frozen, fresh = method.init(KEY, params)
    merged = method.merge(frozen, moved(fresh) if trainable is None else trainable)
    return np.asarray(tree.named_leaves(merged)[path] - tree.named_leaves(params)[path])


# What is trained.


def llama_7b():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    square = {"kernel": shape((32, 4096, 4096))}
    mlp = {name: {"kernel": shape((32, 4096, 11008))} for name in ("gate", "up")}
    blocks = dict.fromkeys(("query", "key", "value", "o"), square)
    blocks |= mlp | {"down": {"kernel": shape((32, 11008, 4096))}, "norm": {"scale": shape((32, 4096))}}
    embed, head = shape((32000, 4096)), shape((4096, 32000))
    return {"embed": {"embedding": embed}, "blocks": blocks, "lm_head": {"kernel": head}}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"rank": 64}, 159_907_840),
        ({"rank": 4, "targets": ["query", "value"]}, 2_097_152),
    ],
)
def test_llama_7b_trains_as_many_numbers_as_published(options, wanted):
    _, trainable = jax.eval_shape(pj.lora(**options).init, KEY, llama_7b())
    assert tree.count(trainable) == wanted


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (pj.lora(rank=3), 3 * (N_IN + N_OUT)),
        (pj.lora_fa(rank=3), 3 * N_OUT),
        (pj.dora(rank=3), 3 * (N_IN + N_OUT) + N_OUT),
        (pj.pissa(rank=3), 3 * (N_IN + N_OUT)),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_the_number_of_trained_numbers(method, wanted):
    assert tree.count(started(method)[1]) == wanted


def test_lora_fa_has_no_trainable_a():
    frozen, trainable = started(pj.lora_fa(rank=2))
    assert list(trainable[WEIGHT]) == ["b"]
    assert list(frozen.state[WEIGHT]) == ["a"]


def test_lora_fa_trains_lookup_tables():
    params = {"words": {"embedding": jax.random.normal(KEY, (9, 4))}}
    method = pj.lora_fa(rank=2, targets=["words"])
    frozen, trainable = started(method, params)
    assert_close(method.merge(frozen, trainable), params)
    assert np.abs(delta_of(method, params=params, path="words/embedding")).max() > 0.1


@pytest.mark.parametrize(
    ("bias", "wanted"), [("none", []), ("adapted", ["up/bias"]), ("all", ["up/bias", "norm/bias"])]
)
def test_biases(bias, wanted):
    params = {**LAYER, "norm": {"bias": jnp.zeros(3)}}
    frozen, trainable = started(pj.lora(rank=2, bias=bias), params)
    assert sorted(set(trainable) - {WEIGHT}) == sorted(wanted)
    changed = {path: {k: v + 1.0 for k, v in slots.items()} for path, slots in trainable.items()}
    merged = pj.lora(rank=2, bias=bias).merge(frozen, changed)
    for path in ("up/bias", "norm/bias"):
        moved_by = tree.named_leaves(merged)[path] - tree.named_leaves(params)[path]
        np.testing.assert_array_equal(moved_by, float(path in wanted))


# Scales.


def test_the_update_has_the_rank_asked_for():
    assert np.linalg.matrix_rank(delta_of(pj.lora(rank=3)), tol=1e-4) == 3


def test_rslora_scales_by_the_root_of_the_rank():
    for name in ("lora", "dora", "lora_fa", "lora_plus", "olora", "pissa"):
        make = pj.METHODS[name].factory
        plain, by_root = (started(make(rank=4, alpha=6.0, rslora=r))[0].plan[0].scale for r in (False, True))
        assert (plain, by_root) == (1.5, 3.0), name
    assert_close(delta_of(pj.rslora(rank=4)), 2.0 * delta_of(pj.lora(rank=4)))


def test_rank_and_alpha_patterns():
    params = {"layers": [{"up": {"kernel": W}, "down": {"kernel": W.T}} for _ in range(2)]}
    method = pj.lora(
        rank=2, alpha=2.0, rank_pattern={"1/up": 4, "up": 3}, alpha_pattern={"^layers/0/down": 6.0}
    )
    frozen, trainable = started(method, params)
    ranks = {path: slots["a"].shape[0] for path, slots in trainable.items()}
    assert ranks == {
        "layers/0/down/kernel": 2,
        "layers/0/up/kernel": 3,
        "layers/1/down/kernel": 2,
        "layers/1/up/kernel": 4,
    }
    scales = {target.path: target.scale for target in frozen.plan}
    assert scales["layers/0/down/kernel"] == 3.0
    assert scales["layers/1/down/kernel"] == 1.0
    assert scales["layers/1/up/kernel"] == 0.5


@pytest.mark.parametrize("chained", [False, True])
def test_one_step_of_lora_plus_moves_b_by_the_ratio(chained):
    method = pj.lora_plus(rank=2, ratio=8.0)
    method = pj.chain(method, pj.unfreeze(["bias"])) if chained else method
    frozen, fresh = started(method)
    trainable = moved(fresh)
    grads = jax.grad(lambda t: jnp.sum(pj.adapt(linear)(method.apply(frozen, t), X) ** 2))(trainable)
    tx = method.optimizer(optax.sgd(0.5))
    updates, _ = tx.update(grads, tx.init(trainable), trainable, frozen=frozen)
    own, of = (tree_["lora_plus"] if chained else tree_ for tree_ in (updates, grads))
    assert_close(own[WEIGHT], {"a": -0.5 * of[WEIGHT]["a"], "b": -4.0 * of[WEIGHT]["b"]})
    if chained:
        assert_close(updates["unfreeze"]["up/bias"], -0.5 * grads["unfreeze"]["up/bias"])


# Starts.

BIG = {"up": {"kernel": jnp.zeros((400, 300))}}


@pytest.mark.parametrize(
    ("init", "deviation", "largest"),
    [("uniform", 1 / math.sqrt(3 * 400), 1 / math.sqrt(400)), ("gaussian", 1 / 16, math.inf)],
)
def test_the_distribution_of_a(init, deviation, largest):
    slots = started(pj.lora(rank=16, init=init), BIG)[1][WEIGHT]
    a = np.asarray(slots["a"])
    np.testing.assert_allclose(a.std(), deviation, rtol=0.03)
    assert abs(a.mean()) < 0.05 * deviation
    assert 0.99 * min(largest, np.abs(a).max()) <= np.abs(a).max() <= largest
    assert not np.asarray(slots["b"]).any()


def test_a_lookup_table_starts_the_other_way_round():
    params = {"words": {"embedding": jnp.zeros((300, 200))}}
    slots = started(pj.lora(rank=16, targets=["words"]), params)[1]["words/embedding"]
    assert not np.asarray(slots["a"]).any()
    np.testing.assert_allclose(np.std(slots["b"]), 1.0, rtol=0.05)


def test_factors_depend_on_the_key_and_the_name_alone():
    def factor(key, params, **options):
        return pj.lora(rank=2, **options).init(key, params)[1][WEIGHT]["a"]

    more = {"another": {"kernel": W}, **LAYER}
    np.testing.assert_array_equal(factor(KEY, LAYER), factor(KEY, more))
    np.testing.assert_array_equal(factor(KEY, LAYER), factor(KEY, more, targets=["up"]))
    assert not np.array_equal(factor(KEY, LAYER), factor(jax.random.key(0), LAYER))
    own = pj.lora(rank=2).init(KEY, more)[1]
    assert not np.array_equal(own[WEIGHT]["a"], own["another/kernel"]["a"])


def test_the_layers_of_a_stack_start_apart():
    a = pj.lora(rank=2).init(KEY, {"blocks": {"up": {"kernel": jnp.stack([W, W])}}})[1]
    assert not np.array_equal(*a["blocks/up/kernel"]["a"])


def test_an_orthogonal_start_has_product_zero_and_both_factors_train():
    slots = started(pj.lora(rank=4, init="orthogonal"))[1][WEIGHT]
    assert all(float(jnp.abs(f).max()) > 0.01 for f in slots.values())
    np.testing.assert_allclose(slots["a"].T @ slots["b"], 0.0, atol=1e-6)


def test_a_start_with_zero_a_trains_a_first():
    slots = started(pj.lora(rank=4, init="zero_a"))[1][WEIGHT]
    assert not np.any(slots["a"])
    assert 0.4 < float(jnp.abs(slots["b"]).max()) <= 0.5  # 1/√r
    with pytest.raises(pj.PeftError, match="lora_fa keeps `a` as it starts"):
        pj.lora_fa(init="zero_a")


STACKED = {"blocks": {"up": {"kernel": normal(KEY, (3, N_IN, N_OUT))}}}


@pytest.mark.parametrize("params", [LAYER, STACKED], ids=["one", "stacked"])
def test_pissa_splits_the_weight_at_its_singular_values(params):
    (path,) = (p for p in tree.named_leaves(params) if p.endswith("kernel"))
    w = np.asarray(tree.named_leaves(params)[path])
    method = pj.pissa(rank=3, alpha=6.0)
    frozen, trainable = started(method, params)
    residual = np.asarray(tree.named_leaves(frozen.params)[path])
    a, b = trainable[path]["a"], trainable[path]["b"]
    np.testing.assert_allclose(residual + 2.0 * np.einsum("...ri,...ro->...io", a, b), w, atol=1e-5)
    sizes = np.linalg.svd(w, compute_uv=False)
    lost = np.sum(residual**2, axis=(-2, -1))
    np.testing.assert_allclose(lost, np.sum(sizes[..., 3:] ** 2, axis=-1), rtol=1e-4)
    np.testing.assert_allclose(np.sum(a**2, -1), np.sum(b**2, -1), rtol=1e-4)


def test_a_randomized_svd_is_close():
    w = {"up": {"kernel": W * jnp.exp(-jnp.arange(N_OUT))}}
    exact, close = (started(pj.pissa(rank=2, iterations=n), w)[0].params for n in (None, 4))
    assert_close(close, exact, 1e-3)


def test_olora_starts_orthonormal():
    method = pj.olora(rank=3, alpha=6.0)
    frozen, trainable = started(method)
    a, b = trainable[WEIGHT]["a"], trainable[WEIGHT]["b"]
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(frozen.params["up"]["kernel"] + 2.0 * a.T @ b, W, atol=1e-5)
    np.testing.assert_allclose(jnp.triu(a[:, :3]), a[:, :3] * np.triu(np.ones((3, 3))), atol=1e-5)
    np.testing.assert_allclose(b @ (W - a.T @ b).T, 0.0, atol=1e-4)


@pytest.mark.parametrize("make", [pj.pissa, pj.olora])
def test_a_start_from_the_weight_keeps_a_bfloat16_base_within_its_precision(make):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), LAYER)
    frozen, trainable = started(make(rank=2), params)
    assert frozen.params["up"]["kernel"].dtype == jnp.bfloat16
    assert trainable[WEIGHT]["a"].dtype == jnp.float32
    assert_close(make(rank=2).merge(frozen, trainable), params, 1e-2)


# DoRA against its definition.

DORA_SHAPES = {
    "linear": ("io", (N_IN, N_OUT), lambda w, x: x @ w, (5, N_IN)),
    "stacked": (
        "sio",
        (3, 8, 8),
        lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0],
        (5, 8),
    ),
    "convolution": (
        "iiio",
        (3, 3, 4, 6),
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (2, 4, 4, 4),
    ),
    "heads": ("ioo", (N_IN, 2, 4), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (5, N_IN)),
    "embedding": ("io", (9, 6), lambda w, x: x[:, :9] @ w[jnp.arange(9)], (5, 9)),
}


@pytest.mark.parametrize("name", DORA_SHAPES)
def test_dora_is_its_definition_with_the_lengths_held_constant(name):
    letters, shape, use, x_shape = DORA_SHAPES[name]
    leaf = "embedding" if name == "embedding" else "kernel"
    params = {"layer": {leaf: jax.random.normal(KEY, shape)}}
    path = f"layer/{leaf}"
    method = pj.dora(rank=2, alpha=3.0, targets=".*", layouts={path: letters})
    frozen, fresh = started(method, params)
    trainable, x = moved(fresh), jax.random.normal(jax.random.key(2), x_shape)
    inputs = tuple(n for n, letter in enumerate(letters) if letter == "i")

    def by_definition(trainable, x):
        slots = trainable[path]
        delta = jnp.einsum("...ri,...ro->...io", slots["a"], slots["b"]).reshape(shape)
        v = params["layer"][leaf] + 1.5 * delta
        lengths = lax.stop_gradient(jnp.sqrt(jnp.sum(v**2, axis=inputs, keepdims=True)))
        return jnp.sum(jnp.sin(use(slots["magnitude"].reshape(lengths.shape) / lengths * v, x)))

    def ours(trainable, x):
        out = pj.adapt(lambda p, x: use(p["layer"][leaf], x))(method.apply(frozen, trainable), x)
        return jnp.sum(jnp.sin(out))

    value_and_grad = functools.partial(jax.value_and_grad, argnums=(0, 1))
    got, want = (jax.jit(value_and_grad(fn))(trainable, x) for fn in (ours, by_definition))
    assert_close(got, want)


def test_dora_of_a_zero_column_is_finite():
    params = {"up": {"kernel": W.at[:, 2].set(0.0)}}
    method = pj.dora(rank=2)
    frozen, trainable = started(method, params)
    fn = lambda t: jnp.sum(pj.matmul(X, method.apply(frozen, t)["up"]["kernel"]) ** 2)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(jax.grad(fn)(moved(trainable))))
    assert_close(method.merge(frozen, trainable), params)


# Layers, experts.


@pytest.mark.parametrize("layers", [0, [2], [0, 2], range(1, 3), [2, 0, 2]])
@pytest.mark.parametrize("make", [pj.lora, pj.dora, pj.lora_fa])
def test_a_layer_filter_on_a_stack_is_one_on_a_list(layers, make):
    listed = {"layers": [{"up": {"kernel": w}} for w in STACKED["blocks"]["up"]["kernel"]]}
    method = make(rank=2, layers=layers)
    frozen, fresh = started(method, STACKED)
    chosen = sorted({layers} if isinstance(layers, int) else set(layers))
    of_list, fresh_list = started(method, listed)
    assert sorted(fresh_list) == [f"layers/{n}/up/kernel" for n in chosen]
    assert tree.count(fresh) == tree.count(fresh_list) < tree.count(started(make(rank=2), STACKED)[1])

    trainable, state = moved(fresh), {}
    for place, layer in enumerate(chosen):
        slots = {name: slot[place] for name, slot in trainable["blocks/up/kernel"].items()}
        fresh_list[f"layers/{layer}/up/kernel"] = slots
        own = frozen.state["blocks/up/kernel"]
        state[f"layers/{layer}/up/kernel"] = {
            name: slot[layer] if name == "squares" else slot[place] for name, slot in own.items()
        }
    of_list = pj.Frozen(of_list.params, state, of_list.plan)
    got = method.merge(frozen, trainable)["blocks"]["up"]["kernel"]
    want = method.merge(of_list, fresh_list)["layers"]
    assert_close(list(got), [layer["up"]["kernel"] for layer in want])
    untouched = [n for n in range(3) if n not in chosen]
    assert_close([got[n] for n in untouched], [STACKED["blocks"]["up"]["kernel"][n] for n in untouched])


def test_an_expert_is_no_layer_and_every_expert_has_its_own_factors():
    layer = {"experts": {"up": {"kernel": jax.random.normal(KEY, (3, 4, 6))}}}
    params = {"layers": [layer, layer]}
    method = pj.lora(rank=2, layers=1, targets=".*experts.*")
    _, trainable = started(method, params)
    assert list(trainable) == ["layers/1/experts/up/kernel"]
    assert trainable["layers/1/experts/up/kernel"]["a"].shape == (3, 2, 4)

    def forward(params, x):
        return jnp.einsum("ed,edf->ef", x, params["layers"][1]["experts"]["up"]["kernel"])

    assert_equals_merged(forward, params, method, X[:3, :4])


def test_a_numbered_layer_is_not_a_stack():
    kernel = jnp.zeros((8, 2, 4))
    for params in ({"layers_0": {"query": {"kernel": kernel}}}, {"layers": [{"query": {"kernel": kernel}}]}):
        assert next(iter(started(pj.lora(rank=2), params)[0].plan)).layout.letters == "ioo"
    stacked = {"layers": {"conv": {"kernel": jnp.zeros((2, 3, 4, 6))}}}
    assert started(pj.lora(rank=2, targets=["conv"]), stacked)[0].plan[0].layout.letters == "siio"


# Dropout.


def thin(method, key, trainable=None):
    frozen, fresh = started(method)
    trainable = moved(fresh) if trainable is None else trainable
    return pj.adapt(linear)(method.apply(frozen, trainable, key=key), X)


def test_dropout_is_off_without_a_key_random_with_one_and_the_same_for_the_same_key():
    method, without = pj.lora(rank=2, dropout=0.5), pj.lora(rank=2)
    np.testing.assert_array_equal(thin(method, None), thin(without, None))
    first, second = jax.random.split(KEY)
    np.testing.assert_array_equal(thin(method, first), thin(method, first))
    assert not np.array_equal(thin(method, first), thin(method, second))
    np.testing.assert_array_equal(thin(without, first), thin(without, None))


def test_dropout_keeps_the_expectation_and_leaves_the_base_alone():
    method = pj.lora(rank=2, dropout=0.25)
    mean = jnp.mean(jax.vmap(lambda key: thin(method, key))(jax.random.split(KEY, 4000)), axis=0)
    np.testing.assert_allclose(mean, thin(method, None), atol=0.15)
    fresh = started(method)[1]
    np.testing.assert_allclose(thin(method, KEY, fresh), linear(LAYER, X), atol=1e-6)


def test_dropout_scales_what_it_keeps():
    method = pj.lora(rank=1, alpha=1.0, dropout=0.75)
    slots = {WEIGHT: {"a": jnp.eye(1, N_IN), "b": jnp.ones((1, N_OUT))}}
    ratios = (thin(method, KEY, slots) - linear(LAYER, X)) / X[:, :1]
    for row in np.asarray(ratios):
        assert np.allclose(row, 0.0, atol=1e-4) or np.allclose(row, 4.0, atol=1e-4)


@pytest.mark.parametrize("make", [pj.lora, pj.dora])
def test_every_layer_of_a_stack_drops_its_own(make):
    kernel = jnp.stack([jnp.eye(8), jnp.eye(8)])
    params = {"blocks": {"up": {"kernel": kernel}}}
    method = make(rank=2, dropout=0.5)
    frozen, fresh = method.init(KEY, params)
    slots = {name: jnp.stack([v[0], v[0]]) for name, v in moved(fresh)["blocks/up/kernel"].items()}
    both = method.apply(frozen, {"blocks/up/kernel": slots}, key=KEY)
    out = pj.adapt(lambda p, x: jnp.stack([x @ p["blocks"]["up"]["kernel"][n] for n in (0, 1)]))(
        both, X[:, :8]
    )
    assert not np.allclose(*out)


# Convolutions.


@pytest.mark.parametrize(
    "options",
    quick_at(
        [
            {"kernel_dilation": 2},
            {"padding": "CIRCULAR"},
            {"padding": "REFLECT", "kernel_dilation": 2},
            {"feature_group_count": 2, "strides": 2},
        ],
        3,
    ),
    ids=str,
)
@pytest.mark.parametrize("make", [pj.lora, pj.dora])
def test_a_convolution_merges_exactly(options, make):
    module = nn.Conv(6, (3, 3), name="conv", **options)
    images = jax.random.normal(KEY, (2, 6, 6, 4))
    params = {"conv": module.init(KEY, images)["params"]}
    method = make(rank=2, targets=["conv"])
    frozen, fresh = method.init(KEY, params)
    trainable = moved(fresh)
    forward = lambda p, x: module.apply({"params": p["conv"]}, x)
    out = pj.adapt(forward)(method.apply(frozen, trainable), images)
    assert_close(out, forward(method.merge(frozen, trainable), images))
    assert float(jnp.abs(out - forward(params, images)).max()) > 1e-3
