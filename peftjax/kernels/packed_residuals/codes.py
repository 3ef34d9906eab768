"""Arrays as codes of 4 or 8 bits, and derivatives as codes on a fixed grid.

The group code is two Pallas kernels on a TPU and on an NVIDIA GPU, in a program for one device or in a
device's own code; it is jnp elsewhere and wherever XLA partitions the program. A fixed grid needs no range of
a group: it is element-wise, which XLA fuses with the derivative before it and the product after it.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType
from jax.typing import DTypeLike

from peftjax.core import primitives
from peftjax.core.errors import PeftError
from peftjax.kernels.packed_residuals import gpu, layout, reference, tpu

GROUP = 64
BITS = (4, 8, 32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "low", "step", "fine"],
    meta_fields=["width", "dtype"],
)
@dataclass(frozen=True)
class Code:
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
    def coarse(self) -> "Code":
        """The part of 4 bits."""
        return replace(self, fine=None)


def encode(x: Array, bits: int, *, group: int = GROUP, key: Array | None = None) -> Code | Array:
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
    x, options = jax.lax.stop_gradient(x), {"group": group, "fine": bits == 8}
    if key is not None:
        parts = reference.quantize(x, jax.random.uniform(key, x.shape), **options)
    else:
        body = partial(reference.quantize, **options) if _explicit(x) else partial(_quantize, **options)
        parts = body(x)
    codes, low, step, *fine = parts
    return Code(codes, low, step, fine[0] if fine else None, x.shape[-1], x.dtype)


def decode(code: Code | Array) -> Array:
    """The array that the codes stand for."""
    if not isinstance(code, Code):
        return code
    operands = (code.codes, code.low, code.step, *([] if code.fine is None else [code.fine]))
    body = reference.dequantize if _explicit(code.codes) else _dequantize
    return body(*operands, width=code.width, dtype=code.dtype)[0]


def coarse(code: Code | Array) -> Code | Array:
    """The 4 bits of a code of 8; any other as it is."""
    return code.coarse if isinstance(code, Code) else code


def check(bits: int, group: int) -> None:
    """Raise `PeftError` for bits or a group that no code has."""
    if bits not in BITS:
        raise PeftError(f"a residual is kept in 4, 8 or 32 bits, not in {bits!r}")
    if group < 2:
        raise PeftError(f"a group has 2 values or more, not {group!r}")


def _explicit(x: Array) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _operation(name: str) -> Any:
    kernels = {"cuda": getattr(gpu, name), "tpu": getattr(tpu, name)}
    return primitives.by_platform(f"packed_residuals_{name}", getattr(reference, name), kernels)


_quantize = _operation("quantize")
_dequantize = _operation("dequantize")


@dataclass(frozen=True)
class Grid:
    """16 fixed values `low + step c`, for derivatives, whose range is known."""

    low: float
    step: float

    def encode(self, x: Array, *, group: int = GROUP) -> Array:
        """The nearest codes of `x [..., D]`, packed: uint8 `[..., D/2]`."""
        place = (x.astype(jnp.float32) - self.low) / self.step
        return layout.pack(jnp.clip(jnp.round(place), 0, 15).astype(jnp.int32), group)

    def decode(self, packed: Array, width: int, *, group: int = GROUP) -> Array:
        """The float32 values `[..., width]` of packed codes."""
        return self.low + self.step * layout.unpack(packed, width, group).astype(jnp.float32)
