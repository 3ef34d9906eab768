"""The product as a Triton kernel: a program makes a tile of y, and decodes weights in registers.

Tiles are powers of two, and what lies beyond an edge is masked, so that every number of rows, inputs and
outputs fits. Groups of a power of two from 16 on fit, and groups of a whole row; others take the reference,
and so do stacks with 2 GiB of codes, of which a program cannot count the bytes, and dtypes other than
float32, bfloat16 and float16.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from peftjax.kernels.dequantized_matmul import reference, tiles
from peftjax.kernels.dequantized_matmul.element import Table, weight


def matmul(
    *operands: Array | None, table: Table | None, group: int, transposed: bool, interpret: bool = False
) -> Array:
    """`reference.matmul`."""
    static = {"table": table, "group": group, "transposed": transposed}
    x, codes = operands[:2]
    width = codes.shape[-1] * (1 if table is None else 2)
    if not _fits(x, codes, group, width):
        return reference.matmul(*operands, **static)
    return tiles.by_matrix(_matmul, operands, **static, interpret=interpret)


def _fits(x: Array, codes: Array, group: int, width: int) -> bool:
    known = x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) and x.size > 0
    grouped = group == width or (group >= 16 and group & (group - 1) == 0)
    return known and grouped and codes.size < 2**31


_Span = tuple[Array | int, int]  # of a tile on an axis: its number and its length


@dataclass(frozen=True)
class _Sizes:
    """Of the weight, and of the tiles of y, made in steps of `along`."""

    width: int
    group: int
    tile: tuple[int, int]
    along: int


def _matmul(
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
    interpret: bool,
) -> Array:
    outputs, width = codes.shape[0], codes.shape[1] * (1 if table is None else 2)
    most = 128 if x.dtype.itemsize == 2 else 64
    rows = min(most, max(16, pl.next_power_of_2(x.shape[0])))
    size = _Sizes(width, group, (rows, most if rows == most else 64), 64 if most == 128 else 32)
    given = {"x": x, "codes": codes, "scales": scales, "shifts": shifts, "u": u, "v": v}
    given = {name: array for name, array in given.items() if array is not None}
    made = tiles.type_like(x, (x.shape[0], width if transposed else outputs), x.dtype)
    cost = tiles.cost(made, given)
    if u is not None:
        # What a Triton product takes.
        missing = max(16, pl.next_power_of_2(u.shape[-1])) - u.shape[-1]
        u, v = tiles.of_one_dtype(u, v)
        given |= {"u": jnp.pad(u, ((0, 0), (0, missing))), "v": jnp.pad(v, ((0, missing), (0, 0)))}
    return pl.pallas_call(
        partial(_kernel, table, size, transposed),
        grid=tuple(pl.cdiv(length, tile) for length, tile in zip(made.shape[::-1], size.tile[::-1])),
        in_specs=[{name: _whole(array.shape) for name, array in given.items()}],
        out_specs=_whole(made.shape),
        out_shape=made,
        cost_estimate=cost,
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows == 128 else 4, num_stages=3),
        interpret=interpret,
        name="dequantized_matmul",
    )(given)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """All of a matrix, of which a program loads what it needs."""
    return pl.BlockSpec(shape, lambda *at: (0, 0))


def _kernel(table: Table | None, size: _Sizes, transposed: bool, read: dict[str, Any], made: Any) -> None:
    rows, outputs = (pl.program_id(1), size.tile[0]), (pl.program_id(0), size.tile[1])

    def step(k: Array, total: Array) -> Array:
        along = (k, size.along)
        x = _load(read["x"], rows, along)
        if transposed:
            w = _decode(read, table, size, along, outputs).astype(x.dtype)
        else:
            w = _decode(read, table, size, outputs, along).astype(x.dtype).T
        return total + jnp.dot(x, w, preferred_element_type=jnp.float32)

    steps = pl.cdiv(read["x"].shape[1], size.along)
    total = lax.fori_loop(0, steps, step, jnp.zeros(size.tile, jnp.float32))
    if "u" in read:
        rank = (0, read["u"].shape[1])
        u, v = _load(read["u"], rows, rank), _load(read["v"], rank, outputs)
        total += jnp.dot(u, v, preferred_element_type=jnp.float32)
    there, mask = _part(made, rows, outputs)
    plgpu.store(there, total.astype(made.dtype), mask=mask)


def _decode(read: dict[str, Any], table: Table | None, size: _Sizes, rows: _Span, columns: _Span) -> Array:
    """Float32 weights of a tile of outputs and inputs."""
    at, length = columns
    bytes = length if table is None else length // 2
    codes = _load(read["codes"], rows, (at, bytes)).astype(jnp.int32)
    if size.group == size.width:
        groups = (0, 1)
    elif size.group <= length:
        groups = (at, length // size.group)
    else:
        groups = (lax.div(at, size.group // length), 1)

    def repeated(name: str) -> Array | None:
        """A number for each byte: both codes of one are of one group."""
        if name not in read:
            return None
        number = _load(read[name], rows, groups).astype(jnp.float32)
        each = jnp.broadcast_to(number[:, :, None], (*number.shape, bytes // number.shape[1]))
        return each.reshape(codes.shape)

    scales, shifts = repeated("scales"), repeated("shifts")
    if table is None:
        return weight(codes, scales, shifts, table)
    pair = [weight(each, scales, shifts, table) for each in (codes >> 4, codes & 15)]
    return jnp.stack(pair, -1).reshape(rows[1], length)


def _load(ref: Any, *spans: _Span) -> Array:
    there, mask = _part(ref, *spans)
    return plgpu.load(there, mask=mask, other=None if mask is None else 0)


def _part(ref: Any, *spans: _Span) -> tuple[Any, Array | None]:
    """A tile, and where it lies in the array: None for all of it."""
    (row, rows), (column, columns) = spans
    mask = None
    for at, length, whole, axis in ((row, rows, ref.shape[0], 1), (column, columns, ref.shape[1], 0)):
        if whole % length:
            inside = jnp.expand_dims(at * length + jnp.arange(length) < whole, axis)
            inside = jnp.broadcast_to(inside, (rows, columns))
            mask = inside if mask is None else mask & inside
    return ref.at[tuple(pl.ds(at * length, length) for at, length in spans)], mask
