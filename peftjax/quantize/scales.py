"""How the scales of groups are kept: as floats, as codes of one byte, or as powers of two.

`encode_scales` takes float32 scales `[*stack, rows, groups]`, none of them negative, and gives an array of
that shape or `Codes` of it.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from peftjax.quantize.codes import Codes
from peftjax.quantize.dynamic_map import decode_unit, encode_unit

ScaleForm = Literal["float32", "bfloat16", "float16", "double", "double_float8", "e8m0", "e4m3"]
"""What a scale is kept as.

- `float32`, `bfloat16`, `float16`: a float.
- `double`: a byte of the dynamic map, of the scale less the mean, with a float32 for 256 of them.
- `double_float8`: the same with a float8_e4m3fn.
- `e8m0`: a byte, the exponent of a power of two.
- `e4m3`: a float8_e4m3fn, with a float32 for the matrix.
"""
DOUBLE_BLOCK = 256
_E4M3 = jnp.float8_e4m3fn
_BIAS = 127


class ScaleCodes(Codes):
    """Codes of float32 scales, one for each group."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[*stack, rows, groups]`."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """float32."""
        return jnp.dtype(jnp.float32)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale", "mean"], meta_fields=[])
@dataclass(frozen=True)
class DoubleScales(ScaleCodes):
    """Scales less their mean, as codes of one byte in blocks of 256 (QLoRA's double quantization).

        scale_i = value(code_i) · block_scale + mean

    Attributes:
        codes: `[*stack, rows, groups]`, uint8 of the dynamic map or float8_e4m3fn.
        scale: float32 `[*stack, blocks]`; a block is 256 scales of a matrix, which run on from row to row.
        mean: float32 `[*stack]`.
    """

    codes: Array
    scale: Float[Array, "*stack blocks"]
    mean: Float[Array, "*stack"]

    def decode(self) -> Float[Array, "*stack rows groups"]:
        """The scales."""
        rows, groups = self.shape[-2:]
        # Not `jnp.repeat`, whose table of places the compiler would take minutes to fold.
        each = jnp.broadcast_to(self.scale[..., None], (*self.scale.shape, DOUBLE_BLOCK))
        each = each.reshape(*self.scale.shape[:-1], -1)[..., : rows * groups].reshape(self.shape)
        return self._values() * each + self.mean[..., None, None]

    def take(self, rows: Array) -> Float[Array, "*n groups"]:
        """The scales of some rows, of a single matrix."""
        groups = self.shape[-1]
        places = rows[..., None] * groups + jnp.arange(groups)
        taken = replace(self, codes=self.codes[rows])
        return taken._values() * self.scale[places // DOUBLE_BLOCK] + self.mean

    def _values(self) -> Array:
        if self.codes.dtype == jnp.uint8:
            return decode_unit(self.codes, signed=True)
        return self.codes.astype(jnp.float32) / float(jnp.finfo(_E4M3).max)


@partial(jax.tree_util.register_dataclass, data_fields=["codes"], meta_fields=[])
@dataclass(frozen=True)
class PowerScales(ScaleCodes):
    """Powers of two by their exponents plus 127, as the OCP microscaling formats have them (E8M0)."""

    codes: UInt8[Array, "*stack rows groups"]

    def decode(self) -> Float[Array, "*stack rows groups"]:
        """The scales."""
        return jnp.ldexp(jnp.float32(1), self.codes.astype(jnp.int32) - _BIAS)

    def take(self, rows: Array) -> Float[Array, "*n groups"]:
        """The scales of some rows, of a single matrix."""
        return PowerScales(self.codes[rows]).decode()


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=[])
@dataclass(frozen=True)
class TwoLevelScales(ScaleCodes):
    """Scales as float8_e4m3fn, in units of one float32 for a matrix (NVFP4, arXiv 2509.25149).

    Attributes:
        codes: float8_e4m3fn `[*stack, rows, groups]`.
        scale: float32 `[*stack]`.
    """

    codes: Array
    scale: Float[Array, "*stack"]

    def decode(self) -> Float[Array, "*stack rows groups"]:
        """The scales."""
        return self.codes.astype(jnp.float32) * self.scale[..., None, None]

    def take(self, rows: Array) -> Float[Array, "*n groups"]:
        """The scales of some rows, of a single matrix."""
        return TwoLevelScales(self.codes[rows], self.scale).decode()


def encode_scales(scales: Float[Array, "*stack rows groups"], form: ScaleForm) -> Array | Codes:
    """Float32 scales, none of them negative, in a form."""
    if form in ("double", "double_float8"):
        return _double(scales, form == "double_float8")
    if form == "e8m0":
        # The scale is rounded down to a power of two, so that no element is below what its code can say.
        _, exponent = jnp.frexp(scales)
        return PowerScales(jnp.clip(exponent - 1 + _BIAS, 0, 254).astype(jnp.uint8))
    if form == "e4m3":
        greatest = float(jnp.finfo(_E4M3).max)
        whole = scales.max((-1, -2)) / greatest
        unit = scales / jnp.where(whole > 0, whole, 1)[..., None, None]
        return TwoLevelScales(jnp.minimum(unit, greatest).astype(_E4M3), whole)
    return scales.astype(form)


def _double(scales: Array, float8: bool) -> DoubleScales:
    *stack, rows, groups = scales.shape
    mean = scales.mean((-1, -2))
    rest = (scales - mean[..., None, None]).reshape(*stack, rows * groups)
    short = -rest.shape[-1] % DOUBLE_BLOCK
    blocks = jnp.pad(rest, [(0, 0)] * len(stack) + [(0, short)]).reshape(*stack, -1, DOUBLE_BLOCK)
    scale = jnp.abs(blocks).max(-1)
    unit = jnp.clip(blocks * (1 / jnp.maximum(scale, float(jnp.finfo(jnp.float32).tiny)))[..., None], -1, 1)
    unit = unit.reshape(*stack, -1)[..., : math.prod((rows, groups))].reshape(scales.shape)
    codes = (unit * float(jnp.finfo(_E4M3).max)).astype(_E4M3) if float8 else encode_unit(unit, signed=True)
    return DoubleScales(codes, scale, mean)
