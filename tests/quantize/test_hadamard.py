"""The Hadamard rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard
from support import KEY, normal

from peftjax.quantize.hadamard import rotated


@pytest.mark.parametrize(("n", "block"), [(256, 256), (12, 4), (7, 1), (36 * 128, 512)])
def test_it_is_the_matrix_of_its_definition_and_its_own_inverse(n, block):
    x = normal(KEY, (3, n))
    matrix = np.kron(np.eye(n // block), hadamard(block) / np.sqrt(block))
    np.testing.assert_allclose(rotated(x), np.asarray(x, np.float64) @ matrix, atol=2e-6)
    np.testing.assert_allclose(rotated(rotated(x)), x, atol=2e-6)


@pytest.mark.slow
def test_an_outlier_is_spread_and_the_dtype_stays():
    x = jnp.zeros((2, 64), jnp.bfloat16).at[:, 5].set(8.0)
    assert rotated(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.abs(rotated(x)), 1.0)
    grad = jax.grad(lambda x: jnp.sum(rotated(x) * x))(x.astype(jnp.float32))
    np.testing.assert_allclose(grad, 2 * rotated(x.astype(jnp.float32)), atol=1e-6)
