"""Activations as codes of a few bits: whole numbers with a zero point; powers of √2 for attention's weights.

Papers: Li et al., "RepQ-ViT", ICCV 2023, arXiv 2212.08254; Li et al., "RepQuant", 2024, arXiv 2402.05628.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

from peftjax.core.checks import one_of
from peftjax.quantize.elements import Integers, Natural

BITS = (2, 3, 4, 5, 6, 7, 8)
_TINY = float(jnp.finfo(jnp.float32).tiny)
_FARTHEST = 0.45
"""Of the width of a range, how far an end is moved."""
_NARROW = 1e-3
"""Of the largest size: a channel whose values differ by less is coded together with zero."""


@partial(jax.tree_util.register_dataclass, data_fields=["scale", "zero"], meta_fields=["bits"])
@dataclass(frozen=True)
class Uniform:
    """Whole numbers of one range for all, or of one for each channel.

        q = clip(round(x / s) + z, 0, 2^b - 1),  x ≈ s (q - z)

    Without a zero point the codes are `-(2^(b-1) - 1) ... 2^(b-1) - 1`, kept as `Integers` keeps them.

    Attributes:
        scale: s, float32, of a shape that broadcasts against x: `[]`, or `[D]` of channels.
        zero: z, float32 whole numbers in that shape; None where the range is symmetric.
        bits: b.
    """

    scale: Float[Array, "..."]
    zero: Float[Array, "..."] | None
    bits: int

    @property
    def element(self) -> Integers | Natural:
        """The whole numbers."""
        return Integers(self.bits) if self.zero is None else Natural(self.bits)

    def encode(self, x: Float[Array, "..."]) -> Integer[Array, "..."]:
        """The codes, of 8 bits without a zero point int8, else uint8."""
        whole = jnp.round(x.astype(jnp.float32) / self.scale)
        return self.element.encode(whole if self.zero is None else whole + self.zero)

    def decode(self, codes: Integer[Array, "..."]) -> Float[Array, "..."]:
        """The float32 numbers that codes stand for."""
        whole = self.element.decode(codes)
        return (whole if self.zero is None else whole - self.zero) * self.scale

    def rounded(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`decode(encode(x))` in x's dtype, with the straight-through gradient: of what is cut off none."""
        low, high = self.limits
        whole = straight_through(jnp.round, x.astype(jnp.float32) / self.scale)
        # Not `jnp.clip`, which halves the gradient of what is at an end, as all of the outermost codes are.
        whole = jnp.where(whole < low, low, jnp.where(whole > high, high, whole))
        return (whole * self.scale).astype(x.dtype)

    @property
    def limits(self) -> tuple[Array | float, Array | float]:
        """The least and the greatest whole number, zero points taken off."""
        greatest = self.element.greatest
        return (-greatest, greatest) if self.zero is None else (-self.zero, greatest - self.zero)


def uniform(
    low: Float[Array, "..."], high: Float[Array, "..."], bits: int, *, symmetric: bool = False
) -> Uniform:
    """The quantizer whose outermost codes are at the ends of a range.

        s = (u - l) / (2^b - 1),  z = round(-l / s)        symmetric:  s = max(|l|, |u|) / (2^(b-1) - 1)

    A range need not contain 0, so that z may be no code. One that is narrow against its distance from 0 is
    widened to 0, and one of zeros alone gets the mean step of the other channels: it has no step of its own.

    Args:
        low: l, of any shape.
        high: u, of that shape.
        bits: b.
        symmetric: whether there is no zero point.
    """
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    if symmetric:
        return Uniform(_positive(size / Integers(bits).greatest), None, bits)
    narrow = high - low <= _NARROW * size
    low = jnp.where(narrow, jnp.minimum(low, 0), low)
    high = jnp.where(narrow, jnp.maximum(high, 0), high)
    scale = _positive((high - low) / Natural(bits).greatest)
    return Uniform(scale, jnp.round(-low / scale), bits)


def moved_ends(start: Uniform, low: Float[Array, "..."] | None, high: Float[Array, "..."]) -> Uniform:
    """The quantizer with the ends of its range moved, each by itself (RepQuant's dual clipping).

        l' = l + (u - l) λ,  u' = u + (u - l) υ        s and z of l' and u', z rounded straight through

    Without a zero point `s' = s (1 + υ)`. λ and υ are cut to ±0.45, beyond which they get no gradient, so
    that the ends never meet. At 0 it is the quantizer at the start.

    Args:
        start: l and u are those of its outermost codes.
        low: λ, of the shape of its scale; None without a zero point.
        high: υ, in that shape.
    """
    high = jnp.clip(high, -_FARTHEST, _FARTHEST)
    if low is None or start.zero is None:
        return Uniform(start.scale * (1 + high), None, start.bits)
    low = jnp.clip(low, -_FARTHEST, _FARTHEST)
    levels = start.element.greatest
    scale = start.scale * (1 + (high - low))
    return Uniform(
        scale, straight_through(jnp.round, (start.zero - levels * low) * start.scale / scale), start.bits
    )


def of_tokens(x: Float[Array, "... D"], bits: int, share: float | Array = 1.0) -> Uniform:
    """A symmetric quantizer for each token, whose outermost code is a share of its largest size."""
    size = share * jnp.abs(jax.lax.stop_gradient(x).astype(jnp.float32)).max(-1, keepdims=True)
    return Uniform(jnp.maximum(size / Integers(bits).greatest, _TINY), None, bits)


@partial(jax.tree_util.register_dataclass, data_fields=["scale"], meta_fields=["bits"])
@dataclass(frozen=True)
class LogSqrt2:
    """Powers of √2 below a scale, for numbers of [0, 1] of which most are small: attention weights.

        q = clip(round(-2 log2(a / s)), 0, 2^b - 1),  a ≈ s 2^(-q/2), and 0 for the last code

    With the last code for zero a key that a mask hides stays hidden.

    Attributes:
        scale: s, float32, a number, or an array that broadcasts against a.
        bits: b.
    """

    scale: Float[Array, "..."]
    bits: int

    @property
    def zero_code(self) -> int:
        """The code of zero, and of all that is as small."""
        return 2**self.bits - 1

    def encode(self, a: Float[Array, "..."]) -> UInt8[Array, "..."]:
        """The codes."""
        share = a.astype(jnp.float32) / self.scale
        exponents = jnp.round(-2 * jnp.log2(jnp.maximum(share, _TINY)))  # 0 has no logarithm
        return jnp.where(share > 0, jnp.clip(exponents, 0, self.zero_code), self.zero_code).astype(jnp.uint8)

    def decode(self, codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
        """The float32 numbers that codes stand for, by shifts."""
        shifts, odd = shifts_of(codes)
        factor = self.scale * jnp.where(odd, jnp.float32(2**0.5), 1)
        return jnp.where(codes == self.zero_code, 0, jnp.ldexp(factor, -shifts))

    def rounded(self, a: Float[Array, "..."]) -> Float[Array, "..."]:
        """`decode(encode(a))` in a's dtype, with the straight-through gradient: of what is cut off none."""
        wide = a.astype(jnp.float32)
        kept = jnp.where(wide > self.scale, self.scale, wide)
        return straight_through(lambda x: self.decode(self.encode(x)), kept).astype(a.dtype)


def shifts_of(codes: UInt8[Array, "..."]) -> tuple[Int[Array, "..."], Bool[Array, "..."]]:
    """A power of √2 as a shift and a factor that only its parity decides, for hardware of powers of two.

        2^(-q/2) = 2^(-⌈q/2⌉) (1 + (√2 - 1)·[q odd])

    Args:
        codes: q.

    Returns:
        `⌈q/2⌉`, int32, and whether q is odd.
    """
    whole = codes.astype(jnp.int32)
    return (whole + 1) // 2, whole % 2 == 1


def straight_through(rounding: Callable[[Array], Array], x: Array) -> Array:
    """`rounding(x)`, whose gradient is that of x."""
    return x + jax.lax.stop_gradient(rounding(x) - x)


def require_bits(caller: str, name: str, bits: int) -> None:
    """Raise a PeftError for bits that no code of an activation has."""
    one_of(caller, name, bits, BITS)


def _positive(scale: Array) -> Array:
    """Scales, of which those that are 0 are the mean of the last axis, or 1 where all are."""
    mean = scale.mean(-1, keepdims=True) if scale.ndim else scale
    return jnp.where(scale > 0, scale, jnp.where(mean > 0, mean, 1))
