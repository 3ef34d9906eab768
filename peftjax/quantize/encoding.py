"""Arrays coded in groups: the scales of each group, and the code nearest to each of its numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.quantize.binary_sums import BinarySum, fit_scales, nearest
from peftjax.quantize.codes import decode
from peftjax.quantize.elements import Element
from peftjax.quantize.groups import BinaryCodes, Format, Grid, GroupCodes
from peftjax.quantize.packing import pack
from peftjax.quantize.scales import encode_scales

_TINY = float(jnp.finfo(jnp.float32).tiny)
"""What the scale of a group of zeros counts as, in a division."""


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
