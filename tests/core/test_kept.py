"""What the backward pass keeps, as read from the trace."""

import jax
import jax.numpy as jnp
from support import KEY

from peftjax.planner.residuals import kept_arrays, nbytes

W, X = jnp.ones((3, 5)), jnp.ones((2, 3))


def shapes(fn, *inputs):
    return sorted(array.shape for array in kept_arrays(fn, *inputs))


def test_what_is_made_is_kept_and_what_is_given_is_not_counted():
    assert shapes(lambda w, x: x @ w, W, X) == []
    assert shapes(lambda w, x: jnp.sin(x) @ w, W, X) == [(2, 3)]
    assert shapes(lambda w, x: (x @ w) ** 2, W, X) == [(2, 5)]


def test_an_input_without_its_gradient_is_still_an_input():
    assert shapes(lambda x, w: x @ jax.lax.stop_gradient(jax.lax.stop_gradient(w)), X, W) == []
    assert shapes(lambda x, w: x @ jax.lax.stop_gradient(2 * w), X, W) == [(3, 5)]


def test_what_is_kept_twice_counts_once():
    def both(w, x):
        h = jnp.sin(x)
        return h @ w + h @ (2 * w)

    assert shapes(both, W, X) == [(2, 3)]


def test_layers_of_a_scan_are_one_array():
    def layers(w, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]

    found = kept_arrays(layers, jax.ShapeDtypeStruct((4, 3, 3), jnp.float32), X)
    assert nbytes(found) == sum(4 * 2 * 3 * 4 for _ in found)
    assert all(array.shape == (4, 2, 3) for array in found)


def test_a_key_counts_as_its_data():
    assert nbytes([jax.typeof(KEY), jax.typeof(X.astype(jnp.bfloat16))]) == 8 + 12
