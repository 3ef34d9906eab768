"""Activations that keep their derivative as 4-bit codes on a fixed grid, or as a mask where it is 0 or 1.

    y = f(x)          dx = g · (low + step c),   c = the nearest of 16 codes of f'(x), taken in float32

The grids hold 0 and 1, so that an input at which f is flat or the identity gets its exact derivative. On
[-1/6, 13/12] the codes are 1/12 apart; the derivative of GELU ends 0.0456 outside, that of SiLU 0.0165: none
is further than 0.0456 from its code. ReLU is exact. S2A, arXiv 2503.08154, gives the idea and no grid.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from peftjax.core.derivatives import with_backward
from peftjax.quantize.affine import GROUP
from peftjax.quantize.grid import Grid

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


def activate(x: Array, f: Function, grid: Grid | None, *, group: int = GROUP) -> Array:
    """`f(x)` for `x [..., D]`; keeps `D/2` bytes of `x`, or `D/8` where `grid` is None.

    Args:
        x: any float dtype, which the gradient has too.
        f: element-wise.
        grid: of its derivative; None for one that is 0 or 1.
        group: half of it is how far apart two codes of a byte lie.
    """

    def forward(x: Array) -> tuple[Array, Array]:
        wide = lax.stop_gradient(x).astype(jnp.float32)
        slope = jax.jvp(f, (wide,), (jnp.ones_like(wide),))[1]
        codes = jnp.packbits(slope > 0.5, axis=-1) if grid is None else grid.encode(slope, group=group)
        return activate(x, f, grid, group=group), codes

    return with_backward(f, forward, partial(_backward, grid, group, x.dtype))(x)


def with_mask(f: Function) -> Function:
    """`f` with a derivative of 0 or 1, the nearer one, of which one bit is kept.

    Exact for ReLU and ReLU6. Of hard-swish it is 1 above zero, the signed function of MobileTL: Chiang et
    al., AAAI 2023, arXiv 2212.03246.

    Args:
        f: element-wise.
    """
    return partial(activate, f=f, grid=None)


def _backward(grid: Grid | None, group: int, dtype: DTypeLike, residuals: Array, g: Array) -> tuple[Array]:
    width = g.shape[-1]
    if grid is None:
        return (jnp.where(jnp.unpackbits(residuals, axis=-1, count=width), g, 0).astype(dtype),)
    return ((g.astype(jnp.float32) * grid.decode(residuals, width, group=group)).astype(dtype),)
