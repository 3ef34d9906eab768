"""Codes of 4 bits on a fixed grid, for derivatives, whose range is known.

A grid needs no range of a group: it is element-wise, which XLA fuses with the derivative before it and the
product after it.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from peftjax.kernels.packed_residuals import pack, unpack
from peftjax.quantize.affine import GROUP


@dataclass(frozen=True)
class Grid:
    """16 fixed values `low + step c`."""

    low: float
    step: float

    def encode(self, x: Array, *, group: int = GROUP) -> Array:
        """The nearest codes of `x [..., D]`, packed: uint8 `[..., D/2]`."""
        place = (x.astype(jnp.float32) - self.low) / self.step
        return pack(jnp.clip(jnp.round(place), 0, 15).astype(jnp.int32), group)

    def decode(self, packed: Array, width: int, *, group: int = GROUP) -> Array:
        """The float32 values `[..., width]` of packed codes."""
        return self.low + self.step * unpack(packed, width, group).astype(jnp.float32)
