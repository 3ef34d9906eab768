"""Any function that its backward pass recomputes from codes of its inputs: attention, a gated activation.

The derivative is taken at the decoded codes of `x`, and at `rest` as it is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.derivatives import with_backward
from peftjax.quantize import Codes, decode

Function = Callable[..., Array]


def recomputed_from_codes(
    f: Function, x: tuple[Array, ...], codes: tuple[Codes | Array, ...], rest: tuple[Any, ...] = ()
) -> Array:
    """`f(*x, *rest)`, of which backward keeps `codes`, those of `x`, and `rest`.

    Args:
        f: reads nothing but its arguments and Python values.
        x: arrays.
        codes: of them.
        rest: trees of arrays; those of floats are differentiated too.
    """

    def plain(x: tuple[Array, ...], codes: Any, rest: tuple[Any, ...]) -> Array:
        return f(*x, *rest)

    def forward(x: tuple[Array, ...], codes: Any, rest: tuple[Any, ...]) -> tuple[Array, tuple]:
        return recomputed_from_codes(f, x, codes, rest), (codes, rest)

    return with_backward(plain, forward, partial(_backward, f))(x, codes, rest)


def _backward(f: Function, residuals: tuple, g: Array) -> tuple[Any, None, Any]:
    codes, rest = residuals
    leaves, structure = jax.tree.flatten(rest)
    floats = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(jax.typeof(leaf).dtype, jnp.floating)]

    def of_floats(x: tuple[Array, ...], values: list[Array]) -> Array:
        full = list(leaves)
        for n, value in zip(floats, values):
            full[n] = value
        return f(*x, *jax.tree.unflatten(structure, full))

    _, pull = jax.vjp(of_floats, tuple(map(decode, codes)), [leaves[n] for n in floats])
    dx, d_floats = pull(g)
    cotangents: list[Any] = [None] * len(leaves)
    for n, value in zip(floats, d_floats):
        cotangents[n] = value
    return dx, None, jax.tree.unflatten(structure, cotangents)
