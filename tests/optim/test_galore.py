"""GaLore's AdamW against the released algorithm, written out in NumPy's float64 on torch's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizing
import pytest
from support import KEY, assert_close, quick_at

from peftjax.core.errors import PeftError
from peftjax.optim._galore import galore

SHAPES = {"up": (6, 10), "down": (10, 6), "square": (6, 6)}
RATES = optax.linear_schedule(0.1, 0.0, 10)


def tree_of(step):
    keys = jax.random.split(jax.random.fold_in(KEY, step), 5)
    kernels = {name: {"kernel": jax.random.normal(k, s)} for (name, s), k in zip(SHAPES.items(), keys)}
    stack = {"kernel": jax.random.normal(keys[3], (2, 4, 8))}
    return {**kernels, "blocks": {"fc": stack}, "head": {"kernel": jax.random.normal(keys[4], (6, 4))}}


PARAMS, GRADS = tree_of(99), [tree_of(step) for step in range(8)]


def train(tx, steps=7):
    return optimizing.train(tx, PARAMS, GRADS[:steps])[:2]


def released(w, grads, signs, *, rank, every, scale, rate, weight_decay, side="std", eps=1e-6):
    """The weights `[out, in]` after each step; `signs` aligns singular vectors, whose signs are free."""
    w, (b1, b2), first, second, history = w.astype(np.float64), (0.9, 0.999), 0.0, 0.0, []
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        tall = g.shape[0] >= g.shape[1]
        right = tall if side == "std" else not tall
        if (t - 1) % every == 0:
            u, _, vh = np.linalg.svd(g, full_matrices=False)
            q = signs(t - 1, vh[:rank] if right else u[:, :rank].T)
        r = g @ q.T if right else q @ g
        first, second = b1 * first + (1 - b1) * r, b2 * second + (1 - b2) * r**2
        normed = first / (np.sqrt(second) + eps)
        step = rate(t - 1) * np.sqrt(1 - b2**t) / (1 - b1**t)
        w = w - step * scale * (normed @ q if right else q.T @ normed)
        w = w - rate(t - 1) * weight_decay * w
        history.append(w)
    return history[-1]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("basis", quick_at(["svd", "gram"], 0))
def test_the_released_algorithm_through_two_refreshes(name, basis):
    options = {"rank": 3, "every": 3, "scale": 0.5, "weight_decay": 0.1}
    tx = galore(RATES, basis=basis, **options)
    update, params, states = jax.jit(tx.update), PARAMS, [tx.init(PARAMS)]
    for grads in GRADS[:7]:
        made, state = update(grads, states[-1], params)
        params, states = optax.apply_updates(params, made), [*states, state]

    def signs(step, vectors):
        (mine,) = states[step + 1][0].bases[f"{name}/kernel"].values()
        return np.sign(np.sum(np.asarray(mine) * vectors, -1, keepdims=True)) * vectors

    torch = [np.asarray(g[name]["kernel"]).T for g in GRADS[:7]]
    wanted = released(np.asarray(PARAMS[name]["kernel"]).T, torch, signs, rate=RATES, **options)
    np.testing.assert_allclose(params[name]["kernel"], wanted.T, atol=2e-5)


def test_everything_else_has_the_same_adam_without_scale():
    params, *_ = train(galore(RATES, rank=3, every=3, weight_decay=0.1))
    head = [np.asarray(g["head"]["kernel"]).T for g in GRADS[:7]]
    whole = {"rank": 4, "every": 100, "scale": 1.0, "weight_decay": 0.1}
    eye = lambda _, vectors: np.eye(len(vectors), vectors.shape[1])
    wanted = released(np.asarray(PARAMS["head"]["kernel"]).T, head, eye, rate=RATES, **whole)
    np.testing.assert_allclose(params["head"]["kernel"], wanted.T, atol=1e-5)


@pytest.mark.slow
def test_eps_is_outside_the_bias_correction():
    """The first step of a gradient of eps: 1/2 with optax's eps, √0.001 / (√0.001 + 1) with this."""
    params = {"head": {"kernel": jnp.ones((2, 2))}, "w": jnp.ones((4, 4))}
    grads = {"head": {"kernel": jnp.full((2, 2), 1e-6)}, "w": jnp.eye(4)}
    made = {}
    for order in ("released", "optax"):
        tx = galore(1.0, rank=2, targets=["w"], order=order, eps=1e-6)
        made[order] = float(tx.update(grads, tx.init(params), params)[0]["head"]["kernel"][0, 0])
    np.testing.assert_allclose(made["optax"], -0.5, rtol=1e-4)
    root = 0.001**0.5
    np.testing.assert_allclose(made["released"], -root / (root + 1.0), rtol=1e-4)


def test_the_order_of_optax_is_its_adamw_for_what_is_not_projected():
    params, *_ = train(galore(RATES, rank=3, order="optax", weight_decay=0.1))
    wanted, *_ = train(optax.adamw(RATES, weight_decay=0.1))
    np.testing.assert_allclose(params["head"]["kernel"], wanted["head"]["kernel"], rtol=1e-5)


@pytest.mark.parametrize("order", ["released", "optax"])
def test_the_decay_is_of_the_weights_after_the_step_or_before(order):
    plain, *_ = train(galore(0.1, rank=3, order=order), 1)
    decayed, *_ = train(galore(0.1, rank=3, order=order, weight_decay=0.5), 1)
    source = plain if order == "released" else PARAMS
    assert_close(decayed, jax.tree.map(lambda w, s: w - 0.05 * s, plain, source), 1e-6)


@pytest.mark.parametrize("order", ["released", "optax"])
def test_the_decay_can_be_masked(order):
    mask = jax.tree.map(lambda w: w.shape == (6, 4), PARAMS)
    params, *_ = train(galore(0.1, rank=3, order=order, weight_decay=0.5, decay_mask=mask), 2)
    plain, *_ = train(galore(0.1, rank=3, order=order), 2)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, plain)
    assert same["up"]["kernel"]
    assert not same["head"]["kernel"]


def test_the_scale_multiplies_the_step_of_projected_matrices_only():
    (one, *_), (two, *_) = (train(galore(0.1, rank=3, scale=scale), 1) for scale in (0.25, 0.5))
    for name, factor in (("up", 2.0), ("head", 1.0)):
        moved = [p[name]["kernel"] - PARAMS[name]["kernel"] for p in (one, two)]
        np.testing.assert_allclose(moved[1], factor * moved[0], atol=1e-6)


def test_a_learning_rate_can_be_injected():
    injected = optax.inject_hyperparams(galore, static_args=("rank", "every"))
    tx = injected(learning_rate=RATES, rank=3, every=3, weight_decay=0.1)
    assert_close(train(tx)[0], train(galore(RATES, rank=3, every=3, weight_decay=0.1))[0], 1e-5)


def test_refresh_reaches_the_projection_through_the_chain():
    tx = galore(0.1, rank=3)
    text = str(jax.make_jaxpr(lambda g, s: tx.update(g, s, PARAMS, refresh=False))(PARAMS, tx.init(PARAMS)))
    assert "eigh" not in text
    assert " cond[" not in text


@pytest.mark.slow
@pytest.mark.parametrize("order", ["released", "optax"])
def test_sharded(order):
    tx = galore(0.01, rank=3, every=2, weight_decay=0.1, order=order)
    optimizing.assert_same_when_sharded(tx, PARAMS, GRADS[:4], 2e-5)


@pytest.mark.slow
def test_a_run_goes_on_bit_by_bit_from_its_checkpoint(tmp_path):
    tx = galore(RATES, rank=3, every=2, weight_decay=0.1)
    optimizing.assert_resumes(tx, PARAMS, GRADS[:6], tmp_path)


@pytest.mark.slow
def test_errors():
    with pytest.raises(PeftError, match="order must be one of released, optax, got 'torch'"):
        galore(0.1, rank=3, order="torch")
    tx = galore(0.1, rank=3)
    with pytest.raises(PeftError, match="give the parameters"):
        tx.update(GRADS[0], tx.init(PARAMS))
