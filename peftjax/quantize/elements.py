"""How a code of a few bits stands for a number, up to the scale of its group.

An element has `bits`, `greatest` (the largest size it stands for: a group's scale is its largest number over
it), `encode`, from numbers in units of the scale to codes 0 ... 2^bits - 1, and `decode`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from peftjax.kernels.dequantized_matmul.element import element

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 4-bit NormalFloat: quantiles of a normal number, exact zero and ±1 (QLoRA, arXiv 2305.14314)."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 4-bit float of the OCP microscaling formats, by its bits: sign, 2 of exponent, 1 of mantissa."""
_FP4_SIZES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
BNB_FP4 = (*(size / 12 for size in _FP4_SIZES), *(0.0 - size / 12 for size in _FP4_SIZES))
"""The 4-bit float of bitsandbytes, by its bits; what is just above zero has the code of its second zero."""

Rounding = Literal["lower", "even", "log"]


class Element(Protocol):
    """What a kind of code can do."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def greatest(self) -> float:
        """The largest size that a code stands for."""

    def encode(self, unit: Float[Array, "..."]) -> Num[Array, "..."]:
        """The codes of numbers in units of the scale."""

    def decode(self, codes: Num[Array, "..."]) -> Float[Array, "..."]:
        """The float32 numbers, in units of the scale."""


@dataclass(frozen=True)
class Table:
    """Codes that are places in a table.

    Attributes:
        values: of the codes 0, 1, ..., as many as a power of two.
        rounding: to the nearest; a middle to the lower of its two ("lower") or to the even code ("even").
            With "log" to the nearest logarithm of the size.
    """

    values: tuple[float, ...]
    rounding: Rounding = "lower"

    @property
    def bits(self) -> int:
        """Of a code."""
        return len(self.values).bit_length() - 1

    @property
    def greatest(self) -> float:
        """The largest size in the table."""
        return max(map(abs, self.values))

    def encode(self, unit: Float[Array, "..."]) -> Num[Array, "..."]:
        """The codes, uint8."""
        order, edges, upward = self._edges()
        above = jnp.zeros(unit.shape, jnp.uint8)
        # Comparisons with constants, which fuse; a search in a table would not.
        for edge, up in zip(edges, upward):
            above += (unit >= edge if up else unit > edge).astype(jnp.uint8)
        if np.array_equal(order, np.arange(len(order))):
            return above
        places = (*map(float, order), *[0.0] * (len(self.values) - len(order)))
        return element(above.astype(jnp.int32), places).astype(jnp.uint8)

    def decode(self, codes: Num[Array, "..."]) -> Float[Array, "..."]:
        """The numbers, float32."""
        return element(codes.astype(jnp.int32), self.values)

    def _edges(self) -> tuple[np.ndarray, np.ndarray, list[bool]]:
        """The codes by value, what lies between neighbors, and whether an edge itself goes up."""
        values = np.asarray(self.values, np.float32)
        order = np.argsort(values, kind="stable")
        # The negative zero of a float stands for nothing more.
        order = np.array([n for n in order if not (values[n] == 0 and np.signbit(values[n]))])
        low, high = values[order[:-1]], values[order[1:]]
        if self.rounding == "log":
            same = np.sign(low) == np.sign(high)
            edges = np.where(same, np.sign(high) * np.sqrt(np.abs(low * high)), (low + high) / 2)
        else:
            edges = (low + high) / 2
        upward = [self.rounding == "even" and int(n) % 2 == 0 for n in order[1:]]
        return order.astype(np.uint8), edges.astype(np.float32), upward


@dataclass(frozen=True)
class Integers:
    """Whole numbers -(2^(bits-1) - 1) ... 2^(bits-1) - 1, of which a code is the number plus 2^(bits-1).

    8 bits are kept as int8, the number itself.
    """

    bits: int

    @property
    def greatest(self) -> float:
        """The largest whole number."""
        return 2.0 ** (self.bits - 1) - 1

    def encode(self, unit: Float[Array, "..."]) -> Num[Array, "..."]:
        """The codes: uint8, of 8 bits int8."""
        whole = jnp.clip(jnp.round(unit), -self.greatest, self.greatest).astype(jnp.int8)
        return whole if self.bits == 8 else (whole + 2 ** (self.bits - 1)).astype(jnp.uint8)

    def decode(self, codes: Num[Array, "..."]) -> Float[Array, "..."]:
        """The whole numbers, float32."""
        whole = codes.astype(jnp.float32)
        return whole if self.bits == 8 else whole - 2.0 ** (self.bits - 1)


@dataclass(frozen=True)
class Natural:
    """Whole numbers 0 ... 2^bits - 1, which with a zero point cover a range of any place."""

    bits: int

    @property
    def greatest(self) -> float:
        """The largest code."""
        return 2.0**self.bits - 1

    def encode(self, unit: Float[Array, "..."]) -> Num[Array, "..."]:
        """The codes, uint8."""
        return jnp.clip(jnp.round(unit), 0, self.greatest).astype(jnp.uint8)

    def decode(self, codes: Num[Array, "..."]) -> Float[Array, "..."]:
        """The whole numbers, float32."""
        return codes.astype(jnp.float32)


@dataclass(frozen=True)
class Float8:
    """A float of one byte: jax's own dtype, which rounds to the nearest even.

    Attributes:
        dtype: "float8_e4m3fn" or "float8_e5m2".
    """

    dtype: Literal["float8_e4m3fn", "float8_e5m2"]

    @property
    def bits(self) -> int:
        """8."""
        return 8

    @property
    def greatest(self) -> float:
        """448 or 57,344."""
        return float(jnp.finfo(self.dtype).max)

    def encode(self, unit: Float[Array, "..."]) -> Num[Array, "..."]:
        """The numbers in that dtype; a conversion alone would make what lies above them NaN or infinite."""
        return jnp.clip(unit, -self.greatest, self.greatest).astype(self.dtype)

    def decode(self, codes: Num[Array, "..."]) -> Float[Array, "..."]:
        """The numbers, float32."""
        return codes.astype(jnp.float32)


def powers_of_two(bits: int) -> Table:
    """`±2^-k`, k = 0 ... 2^(bits-1) - 1: a product with one is a shift (ShiftAddViT, arXiv 2306.06446)."""
    sizes = [2.0**-k for k in range(2 ** (bits - 1))]
    return Table((*sizes, *(-size for size in sizes)), "log")


def half_integers(bits: int) -> Table:
    """`±1/2, ±3/2, ...`, as many below zero as above, and no zero (StatsQ, arXiv 2302.02210)."""
    half = 2 ** (bits - 1)
    return Table(tuple(n + 0.5 for n in range(-half, half)), "even")


def limits_of(element: Element) -> tuple[float, float]:
    """What is beyond the outermost codes by no more than half their distance to the next, in units."""
    if isinstance(element, Table):
        if element.rounding == "log":
            return min(element.values) * 2**0.5, max(element.values) * 2**0.5
        low, above, *_, below, high = sorted(set(element.values))
        return low - (above - low) / 2, high + (high - below) / 2
    if isinstance(element, Integers | Natural):
        return (0.0 if isinstance(element, Natural) else -element.greatest) - 0.5, element.greatest + 0.5
    return -1.001 * element.greatest, 1.001 * element.greatest  # no scale is rounded: none is beyond
