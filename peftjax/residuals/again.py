"""Any function whose backward pass makes it again, from codes of its inputs: attention from q, k and v.

The derivative is taken at the decoded codes of `x`, and at `rest` as it is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.kernels.packed_residuals import decode, encode

Function = Callable[[tuple[Array, ...], Any], Array]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def again_from_codes(f: Function, bits: int, group: int, x: tuple[Array, ...], rest: Any) -> Array:
    """`f(x, rest)`, of which backward keeps codes of `x`, and `rest`.

    Args:
        f: reads nothing but its arguments and Python values.
        bits: of the codes.
        group: of the codes, along all axes but the first two as one.
        x: arrays `[B, S, ...]`.
        rest: a tree of arrays; those of floats are differentiated too.
    """
    return f(x, rest)


def _forward(f: Function, bits: int, group: int, x: tuple[Array, ...], rest: Any) -> tuple[Array, tuple]:
    codes = tuple(encode(part.reshape(*part.shape[:2], -1), bits, group=group) for part in x)
    return f(x, rest), (codes, rest, tuple(part.shape[2:] for part in x))


def _backward(f: Function, bits: int, group: int, kept: tuple, g: Array) -> tuple[Any, Any]:
    codes, rest, shapes = kept
    x = tuple(part.reshape(*part.shape[:2], *shape) for part, shape in zip(map(decode, codes), shapes))
    leaves, structure = jax.tree.flatten(rest)
    floats = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(jax.typeof(leaf).dtype, jnp.floating)]

    def of_floats(x: tuple[Array, ...], values: list[Array]) -> Array:
        full = list(leaves)
        for n, value in zip(floats, values):
            full[n] = value
        return f(x, jax.tree.unflatten(structure, full))

    _, pull = jax.vjp(of_floats, x, [leaves[n] for n in floats])
    dx, d_floats = pull(g)
    cotangents: list[Any] = [None] * len(leaves)
    for n, value in zip(floats, d_floats):
        cotangents[n] = value
    return dx, jax.tree.unflatten(structure, cotangents)


again_from_codes.defvjp(_forward, _backward)
