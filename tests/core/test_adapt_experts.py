"""How models use the weights of experts: the same outputs and gradients as the dense array, and thin."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import KEY, assert_equals_merged, assert_no_dense_gradient, noisy, normal

import peftjax as pj

X = normal(KEY, (5, 8))
SIZES = jnp.array([1, 0, 3])  # the last row belongs to no expert
IN_OUT, OUT_IN = (3, 8, 6), (3, 6, 8)


def ragged(x, w, of_x, of_w, batch=((), ()), rows=0, group=0, sizes=SIZES):
    numbers = lax.RaggedDotDimensionNumbers(((of_x, of_w), batch), (rows,), (group,))
    return lax.ragged_dot_general(x, w, sizes, numbers)


def energy_gradient(f, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(f(x))))(x)


RAGGED = {
    "as stored": ("sio", IN_OUT, lambda w, x: lax.ragged_dot(x, w, SIZES)),
    "swapped": ("soi", OUT_IN, lambda w, x: lax.ragged_dot(x, w.swapaxes(1, 2), SIZES)),
    "swapped, read as it is stored": ("sio", OUT_IN, lambda w, x: lax.ragged_dot(x, w.swapaxes(1, 2), SIZES)),
    "contracting the last axis": ("soi", OUT_IN, lambda w, x: ragged(x, w, (1,), (2,))),
    "experts behind": ("ois", (6, 8, 3), lambda w, x: ragged(x.T, w, (0,), (1,), rows=1, group=2)),
    "heads": ("sioo", (3, 8, 2, 3), lambda w, x: ragged(x, w, (1,), (1,))),
    "heads, swapped": ("soio", (3, 2, 8, 3), lambda w, x: ragged(x, w, (1,), (2,))),
    "gradient": ("sio", IN_OUT, lambda w, x: energy_gradient(lambda x: lax.ragged_dot(x, w, SIZES), x)),
    "layers by vmap": (
        "ssio",
        (2, *IN_OUT),
        lambda w, x: jax.vmap(lax.ragged_dot)(jnp.stack([x, -x]), w, jnp.stack([SIZES, SIZES[::-1]])),
    ),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_products(name):
    letters, shape, use = RAGGED[name]
    params = {"w": jax.random.normal(KEY, shape)}
    method = pj.lora(rank=2, targets=".*", layouts={"w": letters})
    assert_equals_merged(lambda p, x: use(p["w"], x), params, method, X, tolerance=1e-4)
    assert_no_dense_gradient(lambda p, x: use(p["w"], x), params, method, X)


@pytest.mark.slow
@pytest.mark.parametrize("method", [pj.dora, pj.paca, pj.snell])
@pytest.mark.parametrize("name", ["swapped", "gradient", "experts behind"])
def test_ragged_products_of_other_methods(name, method):
    letters, shape, use = RAGGED[name]
    method = method(rank=2, targets=".*", layouts={"w": letters})
    frozen, trainable = method.init(KEY, {"w": jax.random.normal(KEY, shape)})
    trainable = noisy(trainable)
    got = pj.adapt(use)(method.apply(frozen, trainable)["w"], X)
    want = use(method.merge(frozen, trainable)["w"], X)
    assert float(jnp.abs(got - want).max()) < 1e-4


def test_the_numbers_of_a_scaled_stack_follow_its_rows():
    w = jax.random.normal(KEY, OUT_IN)
    params, method = {"w": w}, pj.lora(rank=2, targets=".*", layouts={"w": "soi"})
    assert_equals_merged(
        lambda p, x: ragged(x.T, p["w"] * 0.5, (0,), (2,), rows=1), params, method, X, tolerance=1e-4
    )
