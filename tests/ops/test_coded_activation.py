"""Activations that keep codes of their derivative: exact forward, bounded backward, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal

from peftjax.backbone.layers import ACTIVATIONS
from peftjax.ops.coded.activation import GRIDS, activate

X = 2 * normal(KEY, (6, 192))
G = normal(jax.random.key(1), X.shape)
BOUND = {"gelu": 0.0456, "gelu_new": 0.0458, "gelu_pytorch_tanh": 0.0458, "tanh": 1 / 30 + 1e-6, "relu": 0.0}


def coded(name):
    return lambda x: activate(x, ACTIVATIONS[name], GRIDS[name])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_is_bit_for_bit(name, dtype):
    x = X.astype(dtype)
    y = jax.jit(lambda x: jax.vjp(coded(name), x)[0])(x)
    np.testing.assert_array_equal(y, jax.jit(ACTIVATIONS[name])(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_is_off_by_the_grid_at_most(name):
    exact = jax.vjp(ACTIVATIONS[name], X)[1](G)[0]
    found = jax.vjp(coded(name), X)[1](G)[0]
    bound = BOUND.get(name, 1 / 24 + 1e-6)
    assert bool((jnp.abs(found - exact) <= bound * jnp.abs(G) + 1e-6).all())
    error = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert error < (0.05 if bound else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu", "quick_gelu"])
def test_saturated_inputs_are_exact(name):
    far = jnp.array([[-30.0, -9.0, 9.0, 30.0]])
    exact = jax.vjp(ACTIVATIONS[name], far)[1](jnp.ones_like(far))[0]
    found = jax.vjp(coded(name), far)[1](jnp.ones_like(far))[0]
    np.testing.assert_allclose(found, exact, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "width", "nbytes"), [("gelu", 192, 96), ("silu", 37, 19), ("relu", 192, 24), ("relu", 37, 5)]
)
def test_what_is_kept(name, width, nbytes):
    kept = jax.eval_shape(lambda x: jax.tree.leaves(jax.vjp(coded(name), x)[1]), X[:, :width])
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [((6, nbytes), jnp.uint8)]


def test_the_gradient_has_the_inputs_dtype():
    x = X.astype(jnp.bfloat16)
    assert jax.vjp(coded("gelu"), x)[1](x)[0].dtype == jnp.bfloat16
