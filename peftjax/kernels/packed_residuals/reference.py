"""The group code in jnp, which XLA may partition."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from peftjax.kernels.packed_residuals import affine, layout


def quantize(x: Array, noise: Array | None = None, *, group: int, fine: bool) -> list[Array]:
    """`[..., D]` to codes uint8 `[..., G g/2]`, low and step bfloat16 `[..., G]`; with `fine` more."""
    a = layout.grouped(x.astype(jnp.float32), group)
    noise = None if noise is None else layout.grouped(noise, group)
    low, step = affine.limits(jnp.min(a, -1, keepdims=True), jnp.max(a, -1, keepdims=True))
    # The fine codes reach further up than down, and all that is left must lie between two of them.
    coarse_noise = affine.MIDDLE / affine.LEVELS if fine and noise is not None else noise
    codes, rest = affine.coarse(a, low, step, coarse_noise)
    packed = [codes, affine.fine(rest, noise)] if fine else [codes]
    packed = [layout.joined(part).reshape(*x.shape[:-1], -1) for part in packed]
    return [packed[0], low[..., 0].astype(jnp.bfloat16), step[..., 0].astype(jnp.bfloat16), *packed[1:]]


def dequantize(
    codes: Array, low: Array, step: Array, fine: Array | None = None, *, width: int, dtype: DTypeLike
) -> list[Array]:
    """Decode what `quantize` gave to `[..., width]` of `dtype`."""
    count = low.shape[-1]
    c, f = (
        None if part is None else layout.split(part.reshape(*part.shape[:-1], count, -1))
        for part in (codes, fine)
    )
    low, step = low[..., None].astype(jnp.float32), step[..., None].astype(jnp.float32)
    return [layout.ungrouped(affine.value(c, f, low, step), width).astype(dtype)]
