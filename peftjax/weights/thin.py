"""A product of a thin activation with a trained matrix, whose gradient is summed in float32."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.derivatives import with_backward
from peftjax.weights.sharding import keeping


def thin_dot(
    z: Array, second: Array, dimension_numbers: Any, precision: Any, preferred_element_type: Any
) -> Array:
    """`lax.dot_general(z, second, ...)` in z's dtype, contracting z's last axis.

    Backward keeps both; the gradient of `second` is summed in float32 and has its dtype.
    """
    options = (dimension_numbers, precision, preferred_element_type)

    def forward(z: Array, second: Array) -> tuple[Array, tuple[Array, Array]]:
        return thin_dot(z, second, *options), (z, second)

    return with_backward(partial(_dot, *options), forward, partial(_backward, *options))(z, second)


def _dot(dims: Any, precision: Any, preferred: Any, z: Array, second: Array) -> Array:
    return lax.dot_general(
        z, second.astype(z.dtype), dims, precision=precision, preferred_element_type=preferred
    )


def _backward(dims: Any, precision: Any, preferred: Any, kept: Any, g: Array) -> tuple[Array, Array]:
    z, second = kept
    _, pull = jax.vjp(lambda z: _dot(dims, precision, preferred, z, second), z)
    (_, (rank,)), (of_z, of_second) = dims
    free = tuple(n for n in range(z.ndim - 1) if n not in of_z)
    n_batch = len(of_z)
    summed = lax.dot_general(
        z,
        g.astype(z.dtype),
        ((free, tuple(n_batch + n for n in range(len(free)))), (of_z, tuple(range(n_batch)))),
        precision=precision,
        preferred_element_type=jnp.promote_types(second.dtype, jnp.float32),
        out_sharding=keeping(second, (*of_second, *range(rank, second.ndim))),
    )
    return pull(g)[0], jnp.moveaxis(summed, range(n_batch), of_second).astype(second.dtype)
