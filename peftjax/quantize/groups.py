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
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.core.errors import PeftError
from peftjax.quantize.binary_sums import BinarySum, fit_scales, nearest, sums
from peftjax.quantize.codes import Codes, decode
from peftjax.quantize.elements import Element, Integers, Natural, Table, limits_of
from peftjax.quantize.packing import pack, unpack, unpack_at
from peftjax.quantize.scales import ScaleForm, encode_scales

_TINY = float(jnp.finfo(jnp.float32).tiny)
"""What the scale of a group of zeros counts as, in a division."""
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
        rotate: whether codes are of weights whose inputs have been rotated, see `peftjax.ops.hadamard`; a
            `Quantized` does so, and undoes it.
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


def encode(
    x: Float[Array, "*stack rows width"],
    form: Format,
    *,
    dtype: DTypeLike | None = None,
    block: int | None = None,
    grid: Grid | None = None,
) -> GroupCodes:
    """Code an array, to the nearest; a group of zeros decodes to zeros.

    Args:
        x: any floating dtype.
        form: how.
        dtype: what it decodes to; by default that of `x`.
        block: how many numbers are coded at a time, which take several times their size in float32; by
            default all. An array whose rows are divided over devices is coded at once.
        grid: scales and zero points; by default those of the range of each group.
    """
    if isinstance(form.element, BinarySum):
        return _as_sums(x, form, form.element, dtype or x.dtype, block, grid)
    width, group = x.shape[-1], form.group or x.shape[-1]
    in_blocks = _in_blocks(x.shape, form, block)
    if grid is None:
        grid = in_blocks(lambda rows: _ranges(rows.astype(jnp.float32), group, form), x)
    scales, zeros = jax.tree.map(lambda part: part.reshape(*x.shape[:-1], -1), grid)
    kept = encode_scales(scales, form.scales)
    if not form.exact_scale:
        scales = decode(kept).astype(jnp.float32)

    element = form.element

    def packed(rows: Array, scales: Array, zeros: Array | None) -> Array:
        groups = _grouped(rows.astype(jnp.float32), group)
        codes = _codes(groups, scales, zeros, element)
        # Half a byte that is left over has the code of zero, as in bitsandbytes.
        kept_codes = rows.shape[-1] + (rows.shape[-1] % 2 if form.element.bits == 4 else 0)
        codes = codes.reshape(*codes.shape[:-2], -1)[..., :kept_codes]
        return (
            codes if form.element.bits == 8 and codes.dtype != jnp.uint8 else pack(codes, form.element.bits)
        )

    codes = in_blocks(packed, x, scales, zeros)
    codes = codes.reshape(*x.shape[:-1], -1)
    zeros = None if zeros is None else zeros.astype(jnp.uint8)
    return GroupCodes(codes, kept, zeros, form, width, dtype or x.dtype)


def _as_sums(
    x: Array, form: Format, element: BinarySum, dtype: DTypeLike, block: int | None, grid: Grid | None
) -> BinaryCodes:
    group, bits = form.group or x.shape[-1], element.bits
    in_blocks = _in_blocks(x.shape, form, block)

    def fitted(rows: Array) -> Array:
        valid = _grouped(jnp.ones(rows.shape[-1], jnp.float32), group)
        scales = fit_scales(_grouped(rows.astype(jnp.float32), group), valid, element)
        return scales.reshape(*rows.shape[:-1], -1)

    scales = in_blocks(fitted, x) if grid is None else grid[0]
    scales = scales.reshape(*x.shape[:-1], -1)
    if form.scales == "e8m0":
        # To the nearest power, where `encode_scales` rounds down; 0 has none.
        scales = jnp.maximum(scales * 2**0.5, _TINY)
    kept = encode_scales(scales, form.scales)

    def packed(rows: Array, scales: Array) -> Array:
        groups = _grouped(rows.astype(jnp.float32), group)
        codes = nearest(groups, scales.reshape(*groups.shape[:-1], bits))
        return pack(codes.reshape(*rows.shape[:-1], -1)[..., : rows.shape[-1]], bits)

    codes = in_blocks(packed, x, decode(kept).astype(jnp.float32)).reshape(*x.shape[:-1], -1)
    return BinaryCodes(codes, kept, None, form, x.shape[-1], dtype)


def _in_blocks(shape: Sequence[int], form: Format, block: int | None) -> Callable[..., Any]:
    """What calls a function of rows, on all at once or on some after the others.

    The function takes arrays `[rows, n]`, or Nones, and gives such.
    """
    if block is None or math.prod(shape) <= block:
        return lambda fn, *arrays: fn(*arrays)
    width, bits = shape[-1], form.element.bits
    group = form.group or width
    # Whole groups in whole bytes are rows of their own.
    apart = width % group == 0 and bits in (1, 2, 4, 8) and group * bits % 8 == 0
    rows = math.prod(shape[:-1]) * (width // group if apart else 1)
    at_once = max(1, block // (group if apart else width))

    def call(fn: Callable[..., Any], *arrays: Array | None) -> Any:
        # XLA on a CPU would carry arrays of bfloat16 through the loop as float32, but not their bits.
        flat = jax.tree.map(lambda array: _as_bits(array.reshape(rows, -1)), arrays)
        dtypes = jax.tree.map(lambda array: array.dtype, arrays)
        return lax.map(lambda parts: fn(*jax.tree.map(_of_bits, parts, dtypes)), flat, batch_size=at_once)

    return call


def _as_bits(array: Array) -> Array:
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def _of_bits(array: Array, dtype: DTypeLike) -> Array:
    return lax.bitcast_convert_type(array, dtype) if dtype == jnp.bfloat16 else array


def _ranges(rows: Array, group: int, form: Format) -> tuple[Array, Array | None]:
    """The scale of each group of rows, and its zero point."""
    groups, sizes = _grouped(rows, group), _grouped(jnp.ones(rows.shape[-1:]), group).sum(-1)
    found, least = None, None
    for n in range(form.search):
        one = _range(groups, sizes, form, 1 - 0.7 * n / form.search)
        if form.search == 1:
            return one
        scales = one[0]
        codes = _codes(groups, scales, one[1], form.element)
        values = form.element.decode(codes)
        values = values if one[1] is None else values - one[1][..., None]
        error = jnp.sum((values * scales[..., None] - groups) ** 2, -1)
        if found is None or least is None:
            found, least = one, error
            continue
        better = error < least
        found = jax.tree.map(lambda new, old, better=better: jnp.where(better, new, old), one, found)
        least = jnp.minimum(error, least)
    assert found is not None
    return found


def _range(groups: Array, sizes: Array, form: Format, share: float) -> tuple[Array, Array | None]:
    """A share of the range of groups, of which the last may be filled up: `sizes` are without that."""
    if form.range == "mean":
        return share * 2 * jnp.abs(groups).sum(-1) / sizes / (form.element.greatest + 0.5), None
    if not form.has_zeros:
        return share * jnp.abs(groups).max(-1) / form.reach, None
    low, high = share * jnp.minimum(groups.min(-1), 0), share * jnp.maximum(groups.max(-1), 0)
    scales = (high - low) / form.element.greatest
    return scales, jnp.round(-low / jnp.where(scales > 0, scales, 1))


def _codes(groups: Array, scales: Array, zeros: Array | None, element: Element) -> Array:
    unit = groups * (1 / jnp.maximum(scales, _TINY))[..., None]
    if zeros is not None:
        return element.encode(unit + zeros[..., None])
    return element.encode(jnp.clip(unit, -element.greatest, element.greatest))


def _grouped(x: Array, group: int) -> Array:
    """`[..., groups, group]`, the last group filled up with zeros."""
    short = -x.shape[-1] % group
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, group)


def _by_number(of_groups: Array, group: int, width: int) -> Array:
    each = jnp.broadcast_to(of_groups[..., None], (*of_groups.shape, group))
    return each.reshape(*of_groups.shape[:-1], -1)[..., :width]
