"""Codes of 4 or 8 bits of any array, with a range for each group of its last axis.

The equations are those of `peftjax.kernels.packed_residuals.affine`.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
from jax import Array
from jax.typing import DTypeLike

from peftjax.core.errors import PeftError
from peftjax.kernels.packed_residuals import dequantize, quantize
from peftjax.quantize.codes import Codes

GROUP = 64
BITS = (4, 8, 32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "low", "step", "fine"],
    meta_fields=["width", "dtype"],
)
@dataclass(frozen=True)
class AffineCodes(Codes):
    """An array `[..., D]` as codes; see `peftjax.kernels.packed_residuals.affine`.

    Attributes:
        codes: uint8 `[..., D/2]`, two codes each.
        low: bfloat16 `[..., G]`, the least value of each group.
        step: bfloat16 `[..., G]`, between two codes.
        fine: as `codes`, of what those leave; None in a code of 4 bits.
        width: D.
        dtype: of the array.
    """

    codes: Array
    low: Array
    step: Array
    fine: Array | None
    width: int
    dtype: DTypeLike

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., D]`."""
        return (*self.codes.shape[:-1], self.width)

    def decode(self) -> Array:
        """The array that the codes stand for."""
        parts = (self.codes, self.low, self.step, self.fine)
        return dequantize(*parts, width=self.width, dtype=self.dtype)

    @property
    def coarse(self) -> "AffineCodes":
        """The part of 4 bits."""
        return replace(self, fine=None)


def encode(x: Array, bits: int, *, group: int = GROUP, key: Array | None = None) -> AffineCodes | Array:
    """`x [..., D]`, float, as codes of 4 or 8 bits a value, and 32 more bits for each group.

        |x - decode(encode(x))| <= step / 2 with 4 bits, step / 30 with 8;  step = (max - min) / 15 of a group

    Numbers of bfloat16 that are all the same in a group are kept exactly. Codes have no gradient. 32 bits
    keep the array itself.

    Args:
        x: the array; groups are along its last axis.
        bits: 4, 8 or 32.
        group: how many values share a range.
        key: rounds at random, so that the mean over keys is `x`; without it, to the nearest code.

    Raises:
        PeftError: for other `bits`, or a group of fewer than 2.
    """
    check(bits, group)
    if bits == 32:
        return x
    x = jax.lax.stop_gradient(x)
    noise = None if key is None else jax.random.uniform(key, x.shape)
    codes, low, step, *fine = quantize(x, noise, group=group, fine=bits == 8)
    return AffineCodes(codes, low, step, fine[0] if fine else None, x.shape[-1], x.dtype)


def coarse(code: Codes | Array) -> Codes | Array:
    """The 4 bits of a code of 8; any other as it is."""
    return code.coarse if isinstance(code, AffineCodes) else code


def check(bits: int, group: int) -> None:
    """Raise `PeftError` for bits or a group that no code has."""
    if bits not in BITS:
        raise PeftError(f"a residual is kept in 4, 8 or 32 bits, not in {bits!r}")
    if group < 2:
        raise PeftError(f"a group has 2 values or more, not {group!r}")
