"""Activations that keep their derivative as 4-bit codes on a fixed grid, or as a mask where it is 0 or 1.

    y = f(x)          dx = g · (low + step c),   c = the nearest of 16 codes of f'(x), taken in float32
    y = f(a) · b      da = g · D(f'(a) b),  db = g · D(f(a))          D: group codes of the two derivatives

The grids hold 0 and 1, so that an input at which f is flat or the identity gets its exact derivative. On
[-1/6, 13/12] the codes are 1/12 apart; the derivative of GELU ends 0.0456 outside, that of SiLU 0.0165: none
is further than 0.0456 from its code. ReLU is exact. S2A, arXiv 2503.08154, gives the idea and no grid: ours.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from peftjax.kernels.packed_residuals import Grid, decode, encode
from peftjax.residuals.bits import Bits

Function = Callable[[Array], Array]

SMOOTH = Grid(-2 / 12, 1 / 12)
GRIDS = {
    "gelu": SMOOTH,
    "gelu_new": SMOOTH,
    "gelu_pytorch_tanh": SMOOTH,
    "quick_gelu": SMOOTH,
    "silu": SMOOTH,
    "swish": SMOOTH,
    "tanh": Grid(0.0, 1 / 15),
    "relu": None,
}
"""By the activation's name; None is a mask of one bit."""


def activate(x: Array, f: Function, grid: Grid | None, bits: Bits) -> Array:
    """`f(x)` for `x [..., D]`; keeps `D/2` bytes of `x`, or `D/8` where `grid` is None."""
    return _activate(f, grid, bits.group, x.dtype, x) if bits.activation != 32 else _again(f)(x)


def activate_gated(gate: Array, up: Array, f: Function, bits: Bits) -> Array:
    """`f(gate) · up`; keeps two group codes of `[..., D]`."""
    product = partial(_product, f)
    if bits.activation == 32:
        return _again(product)(gate, up)
    return _gated(product, f, bits, gate, up)


_again = partial(jax.checkpoint, prevent_cse=False)


def _product(f: Function, gate: Array, up: Array) -> Array:
    return f(gate) * up


def _derivative(f: Function, x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return jax.jvp(f, (wide,), (jnp.ones_like(wide),))[1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _activate(f: Function, grid: Grid | None, group: int, dtype: DTypeLike, x: Array) -> Array:
    return f(x)


def _activate_forward(
    f: Function, grid: Grid | None, group: int, dtype: DTypeLike, x: Array
) -> tuple[Array, Array]:
    slope = _derivative(f, x)
    return f(x), jnp.packbits(slope > 0.5, axis=-1) if grid is None else grid.encode(slope, group=group)


def _activate_backward(
    f: Function, grid: Grid | None, group: int, dtype: DTypeLike, kept: Array, g: Array
) -> tuple[Array]:
    width = g.shape[-1]
    if grid is None:
        return (jnp.where(jnp.unpackbits(kept, axis=-1, count=width), g, 0).astype(dtype),)
    return ((g.astype(jnp.float32) * grid.decode(kept, width, group=group)).astype(dtype),)


_activate.defvjp(_activate_forward, _activate_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gated(product: Callable[..., Array], f: Function, bits: Bits, gate: Array, up: Array) -> Array:
    return product(gate, up)


def _gated_forward(
    product: Callable[..., Array], f: Function, bits: Bits, gate: Array, up: Array
) -> tuple[Array, tuple]:
    wide = up.astype(jnp.float32)
    slopes = (_derivative(f, gate) * wide).astype(gate.dtype), f(gate)
    kept = tuple(encode(slope, bits.activation, group=bits.group) for slope in slopes)
    return product(gate, up), kept


def _gated_backward(
    product: Callable[..., Array], f: Function, bits: Bits, kept: tuple, g: Array
) -> tuple[Array, ...]:
    return tuple((g * decode(code)).astype(g.dtype) for code in kept)


_gated.defvjp(_gated_forward, _gated_backward)
