"""Numbers as codes with a scale for each group of them along the last axis: what a quantized weight is.

x ≈ scale_g · element(code)           or, with a zero point,    scale_g · (code - zero_g)
x ≈ Σ_k scale_gk · (±1)_k             of sums of binaries, see `binary_sums`
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.core.errors import PeftError
from peftjax.quantize.binary_sums import BinarySum, sums
from peftjax.quantize.codes import Codes, decode
from peftjax.quantize.elements import Element, Integers, Natural, Table, limits_of
from peftjax.quantize.packing import unpack, unpack_at
from peftjax.quantize.scales import ScaleForm

Grid = tuple[Array, Array | None]
"""Scales `[*stack, rows, groups]`, float32, and zero points of that shape where a format has them."""


@dataclass(frozen=True)
class Format:
    """How numbers are coded.

    Attributes:
        element: how a code stands for a number.
        group: how many numbers along the last axis share a scale; None for all of them.
        scales: what the scales are kept as.
        exact_scale: whether codes are of the scale before it was rounded, as bitsandbytes' are.
        search: how many smaller ranges are tried for each group, for the least squared error; 1 for the whole
            range alone.
        runs_on: whether groups that do not divide a row run on into the next one.
        range: what the outermost codes stand for: the largest size of a group's numbers, or, half a code
            further out, twice their mean size.
        rotate: whether codes are of weights whose inputs have been rotated, see `peftjax.quantize.hadamard`;
            a `Quantized` does so, and undoes it.
    """

    element: Element | BinarySum
    group: int | None = None
    scales: ScaleForm = "float32"
    exact_scale: bool = False
    search: int = 1
    runs_on: bool = False
    range: Literal["largest", "mean"] = "largest"
    rotate: bool = False

    @property
    def reach(self) -> float:
        """A group's largest number over its scale, which as a power of two is rounded down."""
        if self.scales != "e8m0":
            return self.element.greatest
        if isinstance(self.element, Table) and self.element.rounding == "log":
            return 2**-0.5  # to the nearest power
        return 2.0 ** math.floor(math.log2(self.element.greatest))

    @property
    def has_zeros(self) -> bool:
        """Whether a group has a zero point."""
        return isinstance(self.element, Natural)

    @property
    def scales_a_group(self) -> int:
        """How many scales a group has: of sums of binaries several."""
        return self.element.bits if isinstance(self.element, BinarySum) else 1


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros"],
    meta_fields=["format", "width", "dtype"],
)
@dataclass(frozen=True)
class GroupCodes(Codes):
    """An array `[*stack, rows, width]` as codes.

    Attributes:
        codes: `[*stack, rows, bytes]`, uint8 with several codes a byte; or int8, or a float of one byte.
        scales: `[*stack, rows, groups]`, an array or codes of it.
        zeros: float32 or integers of that shape, or None.
        format: how it is coded.
        width: of a row.
        dtype: what it decodes to.
    """

    codes: Array
    scales: Array | Codes
    zeros: Array | None
    format: Format
    width: int
    dtype: DTypeLike

    @property
    def shape(self) -> tuple[int, ...]:
        """`[*stack, rows, width]`."""
        return (*self.codes.shape[:-1], self.width)

    @property
    def group(self) -> int:
        """How many numbers share a scale."""
        return self.format.group or self.width

    @property
    def units(self) -> Float[Array, "*stack rows width"]:
        """What the codes stand for before the scale, float32: element, or code - zero."""
        bits = self.format.element.bits
        codes = self.codes if bits == 8 else unpack(self.codes, bits, self.width)
        values = self.format.element.decode(codes)
        return values if self.zeros is None else values - self.by_number(self.zeros.astype(jnp.float32))

    @property
    def num_groups(self) -> int:
        """The groups of a row."""
        return self.scales.shape[-1] // self.format.scales_a_group

    def by_number(self, of_groups: Array) -> Array:
        """What each group has, for each of its numbers."""
        return _by_number(of_groups, self.group, self.width)

    @property
    def limits(self) -> tuple[Array, Array]:
        """The least and the greatest number that is not cut off, for each of a row.

        Beyond the outermost codes that is no more than half their distance to the next.
        """
        low, high = limits_of(self.format.element)
        scale = self.by_number(decode(self.scales).astype(jnp.float32))
        zero = 0.0 if self.zeros is None else self.by_number(self.zeros.astype(jnp.float32))
        return (low - zero) * scale, (high - zero) * scale

    def decode(self) -> Array:
        """The array that the codes stand for."""
        scales = decode(self.scales).astype(jnp.float32)
        return (self.units * self.by_number(scales)).astype(self.dtype)

    def take(self, rows: Array) -> "GroupCodes":
        """Some rows of a single matrix `[rows, width]`, as codes `[*n, width]`."""
        scales = self.scales.take(rows) if isinstance(self.scales, Codes) else self.scales[rows]
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, codes=self.codes[rows], scales=scales, zeros=zeros)

    def at(self, numbers: Array) -> Array:
        """The numbers `[*n]` of each row of a single matrix `[rows, width]`: `[*n, rows]`, and no others."""
        return self.placed(jnp.arange(self.codes.shape[-2]), numbers[..., None])

    def placed(self, rows: Array, numbers: Array) -> Array:
        """The numbers at these rows and places of a single matrix, of one shape or broadcast to one."""
        bits = self.format.element.bits
        codes = (
            self.codes[rows, numbers] if bits == 8 else unpack_at(self.codes, bits, rows, numbers, self.width)
        )
        groups = (rows, numbers // self.group)
        values = self.format.element.decode(codes)
        values = values if self.zeros is None else values - self.zeros[groups].astype(jnp.float32)
        return (values * decode(self.scales)[groups].astype(jnp.float32)).astype(self.dtype)

    @property
    def has_kernel(self) -> bool:
        """Whether `peftjax.kernels.dequantized_matmul` takes such codes."""
        element = self.format.element
        if self.width % self.group or (element.bits == 4 and self.group % 2):
            return False
        return element.bits == 4 or element == Integers(8)

    @property
    def factors(self) -> tuple[tuple[float, ...] | None, Array, Array | None]:
        """What that kernel takes beside codes that it has: table, scales and shifts."""
        element, scales = self.format.element, decode(self.scales)
        if isinstance(element, Table):
            return element.values, scales, None
        if self.zeros is None:
            return tuple(map(float, range(-8, 8))) if element.bits == 4 else None, scales, None
        shifts = -self.zeros.astype(jnp.float32) * scales.astype(jnp.float32)
        return tuple(map(float, range(16))), scales, shifts

    def on_rows(self, fn: Callable[[Array], Array]) -> "GroupCodes":
        """The codes with `fn(array)` for each array `[*stack, rows, n]`; the scales become floats."""
        zeros = None if self.zeros is None else fn(self.zeros)
        return replace(self, codes=fn(self.codes), scales=fn(decode(self.scales)), zeros=zeros)

    def cut(self, start: int, stop: int) -> "GroupCodes | None":
        """The numbers `start ... stop - 1` of each row; None where they are no whole groups and bytes."""
        bits, group = self.format.element.bits, self.group
        if bits not in (1, 2, 4, 8):
            return None  # the parts of a code lie apart
        if any(at % group or at * bits % 8 for at in (start, stop) if at != self.width):
            return None
        first, last = start // group, -(-stop // group)
        zeros = None if self.zeros is None else self.zeros[..., first:last]
        each = self.format.scales_a_group
        return replace(
            self,
            codes=self.codes[..., start * bits // 8 : -(-stop * bits // 8)],
            scales=decode(self.scales)[..., each * first : each * last],
            zeros=zeros,
            width=stop - start,
        )

    def of_width(self, width: int) -> "GroupCodes":
        """The same arrays as the codes of rows of this width, as those of a shard are.

        Raises:
            PeftError: they are not whole groups and bytes of such rows.
        """
        if width == self.width:
            return self
        if self.format.element.bits not in (1, 2, 4, 8):
            raise PeftError(
                f"codes of {self.format.element.bits} bits lie in two parts, which cannot be divided along a "
                "row: divide the rows instead, or use a format of 1, 2, 4 or 8 bits"
            )
        resized = replace(self, width=width)
        if self.num_groups != -(-width // resized.group):
            raise PeftError(
                f"rows of {width} numbers are no whole groups of {self.format.group}: divide the rows of the "
                "codes among fewer devices, or use smaller groups"
            )
        return resized

    def with_plain_scales(self) -> "GroupCodes":
        """The same codes with scales that are floats."""
        return replace(self, scales=decode(self.scales))

    def specs(self, stack: Sequence[Any], row: Any, along: Any) -> "GroupCodes":
        """The codes with the sharding of each array in its place.

        Args:
            stack: the mesh axes of each stack axis.
            row: of the rows.
            along: of the numbers of a row; a scale for the whole row is on all of its devices.
        """
        whole = PartitionSpec(*stack, row, along)
        of_groups = PartitionSpec(*stack, row, along if self.num_groups > 1 else None)

        def spec(array: Array) -> PartitionSpec:
            return of_groups if array.ndim == len(stack) + 2 else PartitionSpec(*stack)

        zeros = None if self.zeros is None else of_groups
        return replace(self, codes=whole, scales=jax.tree.map(spec, self.scales), zeros=zeros)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros"],
    meta_fields=["format", "width", "dtype"],
)
@dataclass(frozen=True)
class BinaryCodes(GroupCodes):
    """An array as sums of binaries; `scales` are `[*stack, rows, groups · q]`, the q of a group together."""

    @property
    def units(self) -> Float[Array, "*stack rows width"]:
        """None.

        Raises:
            PeftError: always, for a number is no multiple of one scale.
        """
        raise PeftError(
            "a sum of binaries has several scales for each number, and no unit; use a format such as int4"
        )

    @property
    def limits(self) -> tuple[Array, Array]:
        """The least and the greatest number that is not cut off, for each of a row."""
        scales = [self.by_number(scale) for scale in self._of_groups()]
        high = sum(scales) + scales[-1]  # the two outermost sums are 2 α_q apart
        return -high, high

    @property
    def has_kernel(self) -> bool:
        """False: a layer decodes its weight."""
        return False

    def decode(self) -> Array:
        """The array that the codes stand for."""
        codes = unpack(self.codes, self.format.element.bits, self.width)
        return sums(codes, [self.by_number(scale) for scale in self._of_groups()]).astype(self.dtype)

    def placed(self, rows: Array, numbers: Array) -> Array:
        """The numbers at these rows and places of a single matrix, of one shape or broadcast to one."""
        codes = unpack_at(self.codes, self.format.element.bits, rows, numbers, self.width)
        found = [scale[rows, numbers // self.group] for scale in self._of_groups()]
        return sums(codes, found).astype(self.dtype)

    def _of_groups(self) -> list[Array]:
        """Each scale, float32 `[*stack, rows, groups]`."""
        scales, bits = decode(self.scales).astype(jnp.float32), self.format.element.bits
        apart = scales.reshape(*scales.shape[:-1], self.num_groups, bits)
        return [apart[..., k] for k in range(bits)]


def _by_number(of_groups: Array, group: int, width: int) -> Array:
    each = jnp.broadcast_to(of_groups[..., None], (*of_groups.shape, group))
    return each.reshape(*of_groups.shape[:-1], -1)[..., :width]
