"""AdamP and SGDP against their equations on one tensor at a time in torch's axes, and what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optimizer_checks import (
    PARAMS,
    assert_keeps_dtypes,
    assert_moves_as,
    assert_resumes,
    assert_sharded_equals_one_device,
    random_like,
    train,
)
from support import assert_close

import peftjax as pj
from peftjax.core.tree import map_named
from peftjax.testing import check_optimizer

OPTIMIZERS = {"adamp": pj.optim.adamp, "sgdp": pj.optim.sgdp}
both = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# The equations, on a tensor whose first axis is the channels.


def projected(p, g, d, delta, wd_ratio, eps):
    for rows in (p.shape[0], 1) if p.ndim > 1 else ():
        w, gradient, direction = (x.reshape(rows, -1) for x in (p, g, d))
        norms = [np.maximum(np.linalg.norm(x, axis=1), eps) for x in (w, gradient)]
        cosine = np.abs((w * gradient).sum(1)) / norms[0] / norms[1]
        if cosine.max() < delta / np.sqrt(w.shape[1]):
            unit = w / (np.linalg.norm(w, axis=1, keepdims=True) + eps)
            free = direction - unit * (unit * direction).sum(1, keepdims=True)
            return free.reshape(p.shape), wd_ratio, "layer" if rows == 1 else "channels"
    return d, 1.0, "none"


def adam_directions(gradients, nesterov, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        yield (b1 * m + (1 - b1) * g if nesterov else m) / (np.sqrt(v / (1 - b2**t)) + eps) / (1 - b1**t)


def momentum_directions(gradients, nesterov, mu=0.9, dampening=0.25):
    b = 0.0
    for g in gradients:
        b = mu * b + (1 - dampening) * g
        yield g + mu * b if nesterov else b


def loop(p, gradients, directions, *, rate, decay, delta):
    seen = set()
    for g, d in zip(gradients, directions):
        d, ratio, view = projected(p, g, d, delta, 0.1, 1e-8)
        p = p * (1 - rate * decay * ratio) - rate * d
        seen.add(view)
    return p, seen


# How the axes of torch follow from the library's; every matrix is one tensor.
MATRICES = {
    "blocks/up/kernel": (np.s_[:2], (3, 6, 8), lambda w: w.T),
    "blocks/experts/down/kernel": (np.s_[:2, :2], (3, 2, 8, 6), lambda w: w.T),
    "attention/query/kernel": (None, (6, 2, 4), lambda w: w.reshape(6, 8).T),
    "attention/out/kernel": (None, (2, 4, 6), lambda w: w.reshape(8, 6).T),
    "conv_1/kernel": (None, (2, 2, 3, 5), lambda w: w.transpose(3, 2, 0, 1)),
    "words/embedding": (None, (7, 8), lambda w: w),
    "linear/weight": (None, (8, 6), lambda w: w),
    "bias": (None, (9,), lambda w: w),
}


def tensors(tree):
    """Every matrix of every stack as torch would hold it, in float64."""
    found = {}
    for path, (stack, shape, to_torch) in MATRICES.items():
        array = np.asarray(tree[path], np.float64)
        layers = shape[: len(stack) if isinstance(stack, tuple) else int(stack is not None)]
        for index in np.ndindex(*layers):
            found[path, index] = to_torch(array[index])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_matrix_of_every_stack_follows_the_equations(name, nesterov):
    params = random_like({path: shape for path, (_, shape, _) in MATRICES.items()}, 0)
    options = {"weight_decay": 0.5, "delta": 1.7, "nesterov": nesterov}
    dampening = {} if name == "adamp" else {"dampening": 0.25}
    got, _ = train(OPTIMIZERS[name](0.02, **options, **dampening), params, range(5))
    each, result = [tensors(random_like(params, 100 + t)) for t in range(5)], tensors(got)
    directions, decay = (adam_directions, 0.5) if name == "adamp" else (momentum_directions, 0.5 / (1 - 0.9))
    seen = set()
    for key, tensor in tensors(params).items():
        g = [gradients[key] for gradients in each]
        want, views = loop(tensor, g, directions(g, nesterov), rate=0.02, decay=decay, delta=1.7)
        np.testing.assert_allclose(result[key], want, rtol=2e-5, atol=2e-6, err_msg=str(key))
        seen |= views
    assert seen == {"channels", "layer", "none"}


@pytest.mark.slow
def test_without_the_projection_adamp_is_adamw_and_sgdp_is_sgd():
    options = {"weight_decay": 0.3}
    assert_moves_as(pj.optim.adamp(1e-2, delta=0.0, **options), optax.adamw(1e-2, **options), tolerance=2e-5)
    assert_moves_as(pj.optim.sgdp(1e-2, delta=0.0), optax.sgd(1e-2, momentum=0.9), tolerance=1e-6)
    nesterov = optax.sgd(1e-2, momentum=0.9, nesterov=True)
    assert_moves_as(pj.optim.sgdp(1e-2, delta=0.0, nesterov=True), nesterov, tolerance=1e-6)


# What the projection promises.


@pytest.mark.slow
@both
def test_where_it_always_projects_no_channel_moves_along_itself(make):
    tx = make(1.0, delta=jnp.inf)
    _, state = train(tx, PARAMS, range(3))
    updates, _ = jax.jit(tx.update)(random_like(PARAMS, 103), state, PARAMS)
    for path in ("query", "down"):
        w, u = PARAMS["blocks"][path]["kernel"], updates["blocks"][path]["kernel"]
        along = jnp.abs(jnp.sum(w * u, 1))
        assert float((along / jnp.linalg.norm(w, axis=1) / jnp.linalg.norm(u, axis=1)).max()) < 1e-6


@both
def test_a_scale_invariant_weight_grows_by_its_steps_only(make):
    target = random_like((6, 8), 1)
    loss = lambda p: jnp.sum(target * p["kernel"]) / jnp.linalg.norm(p["kernel"])

    def growth(delta):
        tx, params = make(0.05, delta=delta, weight_decay=0.0), {"kernel": random_like((6, 8), 2)}
        state, expected = tx.init(params), jnp.sum(params["kernel"] ** 2)
        update = jax.jit(lambda params, state: tx.update(jax.grad(loss)(params), state, params))
        for _ in range(10):
            updates, state = update(params, state)
            expected = expected + jnp.sum(updates["kernel"] ** 2)
            params = optax.apply_updates(params, updates)
        return float(jnp.sum(params["kernel"] ** 2) / expected)

    assert growth(0.1) == pytest.approx(1.0, abs=2e-6)
    assert abs(growth(0.0) - 1.0) > 1e-3


@both
def test_vectors_decay_in_full_and_projected_matrices_by_the_ratio(make):
    tx = make(0.1, weight_decay=0.01, wd_ratio=0.25)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    decay = 0.1 * 0.01 / (1 - 0.9 if make is pj.optim.sgdp else 1)
    kernels = lambda path, w: -decay * w * (0.25 if path.endswith("kernel") else 1.0)
    assert_close(updates, map_named(kernels, PARAMS), 1e-8)


@both
def test_channels_in_another_order_move_alike(make):
    order = np.random.default_rng(3).permutation(16)
    tx = make(0.1, delta=2.0, weight_decay=0.1)
    w = {"kernel": PARAMS["blocks"]["query"]["kernel"][0]}
    g = random_like(w, 4)
    move = jax.jit(lambda w, g: tx.update(g, tx.init(w), w)[0]["kernel"])
    mixed = move({"kernel": w["kernel"][:, order]}, {"kernel": g["kernel"][:, order]})
    np.testing.assert_allclose(mixed, move(w, g)[:, order], rtol=0, atol=1e-6)


# Which axes, which parameters.


def decays(params, **options):
    """The share of the decay that each parameter has when its gradient is zero: 1 if never projected."""
    tx = pj.optim.adamp(1.0, weight_decay=1.0, wd_ratio=0.5, **options)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    return jax.tree.map(lambda u, w: float(jnp.max(-u / w)), updates, params)


def test_layouts_name_vectors_and_matrices():
    params = {"blocks": {"decay": jnp.ones((2, 3)), "scale": jnp.ones((2, 3))}}
    assert decays(params) == {"blocks": {"decay": 0.5, "scale": 1.0}}
    layouts = {"decay": "so", "scale": "io"}
    assert decays(params, layouts=layouts) == {"blocks": {"decay": 1.0, "scale": 0.5}}


def test_factors_of_adapters_are_left_alone():
    method = pj.lora(rank=2, targets=["query"])
    _, trainable = method.init(jax.random.key(0), PARAMS)
    ones = jax.tree.map(jnp.ones_like, trainable)
    assert set(jax.tree.leaves(decays(ones))) == {1.0}
    _, whole = pj.full().init(jax.random.key(0), PARAMS)
    assert decays(whole)["blocks/query/kernel"] == pytest.approx(0.5)


def test_wrong_layouts_are_errors():
    for layouts, message in (
        ({"qery": "sio"}, "'qery' matched no target; closest: .*query"),
        ({"query": "io"}, "layout 'io' does not fit shape"),
        ({"query": "so"}, "layout 'so' does not fit shape"),
    ):
        with pytest.raises(pj.PeftError, match=message):
            pj.optim.adamp(1e-3, layouts=layouts).init(PARAMS)


@both
def test_an_update_without_parameters_is_an_error(make):
    with pytest.raises(pj.PeftError, match="p: give the parameters too"):
        make(1e-3).update(PARAMS, make(1e-3).init(PARAMS))


# Inside optax, on meshes, from checkpoints.


@pytest.mark.slow
@both
def test_works_inside_optax_sharded_and_resumed(make, tmp_path):
    rate = optax.linear_schedule(1e-2, 2e-3, 4)
    tx = make(rate, weight_decay=0.1, delta=1.7)
    check_optimizer(tx)
    assert_sharded_equals_one_device(tx)
    assert_resumes(tx, tmp_path)


@pytest.mark.slow
def test_works_on_meshes_with_explicit_axes():
    assert_sharded_equals_one_device(pj.optim.adamp(1e-2, delta=1.7, weight_decay=0.1), AxisType.Explicit)


def test_hyperparameters_may_be_injected():
    tx = optax.inject_hyperparams(pj.optim.sgdp)(learning_rate=1e-2, weight_decay=0.1, delta=1.7)
    assert_moves_as(tx, pj.optim.sgdp(1e-2, weight_decay=0.1, delta=1.7), tolerance=2e-5)


@both
def test_keeps_dtypes(make):
    assert_keeps_dtypes(make(1e-2, weight_decay=0.1, state_dtype="float32"))


@pytest.mark.slow
def test_another_momentum_may_be_projected():
    tx = optax.chain(pj.optim.remove_radial(optax.scale_by_lion(), delta=jnp.inf), optax.scale(-0.1))
    got, _ = train(tx, PARAMS, range(1))
    want, _ = train(optax.lion(0.1), PARAMS, range(1))
    w = PARAMS["blocks"]["down"]["kernel"]
    moves = [np.asarray(tree["blocks"]["down"]["kernel"] - w) for tree in (got, want)]
    unit = w / jnp.linalg.norm(w, axis=1, keepdims=True)
    free = moves[1] - unit * jnp.sum(unit * moves[1], 1, keepdims=True)
    np.testing.assert_allclose(moves[0], free, atol=1e-6)
