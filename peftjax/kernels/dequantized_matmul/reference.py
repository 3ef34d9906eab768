"""The product in jnp, which XLA may partition: a large weight is decoded some rows at a time.

Tile j of k holds the rows j, k + j, 2k + j, ...: where a mesh shards the outputs, each device decodes the
rows of a tile that it has, and moves no codes.
"""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from peftjax.kernels.dequantized_matmul.element import Table, shifted, weight

LARGEST = 2**22
"""Weights that are decoded at once: 16 MiB of float32."""


def matmul(
    x: Array,
    codes: Array,
    scales: Array,
    shifts: Array | None,
    u: Array | None,
    v: Array | None,
    *,
    table: Table | None,
    group: int,
    transposed: bool,
    lookups: bool = False,
) -> Array:
    """`x W + u v`, or `x Wᵀ + u v`, in x's dtype.

    codes `[*stack, out, in / codes per byte]`, scales and shifts `[*stack, out, in / group]`; x
    `[*stack, *lead, in]` (or out), u `[*stack, *lead, r]`, v `[*stack, r, out]` (or in). `lookups` is that of
    `decode`.
    """
    rows = codes.shape[-2]
    count, whole = _tiles(rows, math.prod(codes.shape) // rows * (1 if table is None else 2))
    coded = (codes, scales, shifts)
    body = _by_inputs if transposed else _by_outputs
    decoded = partial(decode, table=table, group=group, dtype=x.dtype, lookups=lookups)
    if whole == rows:
        return body(x, coded, u, v, count, decoded)
    first, rest = ([_rows(part, ends) for part in coded] for ends in (slice(whole), slice(whole, None)))
    if transposed:
        some = body(x[..., :whole], first, u, v, count, decoded, dtype=jnp.float32)
        return (some + body(x[..., whole:], rest, None, None, 1, decoded, dtype=jnp.float32)).astype(x.dtype)
    ends = (None, None) if v is None else (v[..., :whole], v[..., whole:])
    return jnp.concatenate(
        [body(x, first, u, ends[0], count, decoded), body(x, rest, u, ends[1], 1, decoded)], -1
    )


def decode(
    codes: Array,
    scales: Array,
    shifts: Array | None,
    *,
    table: Table | None,
    group: int,
    dtype: DTypeLike,
    lookups: bool = False,
) -> Array:
    """The weights `[*stack, rows, in]` of some rows, rounded once from float32.

    With `lookups` the elements of a byte are read from a table of all bytes, which takes a CPU less time than
    selects.
    """
    scales, shifts = scales[..., None], None if shifts is None else shifts[..., None]
    if table is not None and lookups:
        pairs = jnp.array([(high, low) for high in table for low in table], jnp.float32)
        elements = pairs.at[codes].get(mode="promise_in_bounds").reshape(*scales.shape[:-1], group)
        value = shifted(elements, scales, shifts)
    else:
        each = codes.astype(jnp.int32)
        if table is not None:
            each = (each[..., None] >> jnp.array([4, 0])) & 15
        value = weight(each.reshape(*scales.shape[:-1], group), scales, shifts, table)
    return value.reshape(*scales.shape[:-2], -1).astype(dtype)


def product(x: Array, w: Array, axis: int) -> Array:
    """Float32 `x · w` over x's last axis and this one of w `[*stack, rows, columns]`."""
    stack = tuple(range(w.ndim - 2))
    dims = (((x.ndim - 1,), (w.ndim + axis,)), (stack, stack))
    return lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def low_rank(u: Array, v: Array) -> Array:
    """Float32 `u v`, the factors in the wider of their dtypes."""
    dtype = jnp.promote_types(u.dtype, v.dtype)
    return product(u.astype(dtype), v.astype(dtype), -2)


def _by_outputs(
    x: Array, coded: tuple, u: Array | None, v: Array | None, count: int, decoded: Callable[..., Array]
) -> Array:
    """Every tile of rows makes some outputs."""

    def some(j: Array | int) -> Array:
        w = decoded(*(_tile(part, j, count, -2) for part in coded))
        y = product(x, w, -1)
        if u is not None:
            y += low_rank(u, _tile(v, j, count, -1))
        return y.astype(x.dtype)

    if count == 1:
        return some(0)
    outputs = jnp.moveaxis(lax.map(some, jnp.arange(count)), 0, -1)
    return outputs.reshape(*outputs.shape[:-2], -1)


def _by_inputs(
    x: Array,
    coded: tuple,
    u: Array | None,
    v: Array | None,
    count: int,
    decoded: Callable[..., Array],
    dtype: DTypeLike | None = None,
) -> Array:
    """Every tile of rows adds to all inputs."""
    dtype = dtype or x.dtype

    def some(j: Array | int) -> Array:
        w = decoded(*(_tile(part, j, count, -2) for part in coded))
        return product(_tile(x, j, count, -1), w, -2)

    total = lax.fori_loop(1, count, lambda j, total: total + some(j), some(0))
    return (total if u is None else total + low_rank(u, v)).astype(dtype)


def _tile(part: Array | None, j: Array | int, count: int, axis: int) -> Array | None:
    """Every `count`-th slice of an axis, from the j-th on."""
    if part is None or count == 1:
        return part
    at = part.ndim + axis
    split = part.reshape(*part.shape[:at], -1, count, *part.shape[at + 1 :])
    return lax.dynamic_index_in_dim(split, j, at + 1, keepdims=False)


def _rows(part: Array | None, ends: slice) -> Array | None:
    return None if part is None else part[..., ends, :]


def _tiles(rows: int, width: int) -> tuple[int, int]:
    """Into how many tiles the rows are cut, and how many rows these hold: all, where the number allows.

    Of the divisors at hand the one whose tiles hold a multiple of the largest power of two: what a mesh has.
    """
    least = -(-rows * width // LARGEST)
    if least <= 1:
        return 1, rows
    most = min(4 * least, rows)
    divisors = [count for count in range(least, most + 1) if rows % count == 0]
    if not divisors:
        return most, rows - rows % most
    return max(divisors, key=lambda count: (min(_power(rows // count), 128), -count)), rows


def _power(number: int) -> int:
    """The largest power of two that divides it."""
    return number & -number
