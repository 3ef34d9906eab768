"""The product as a Mosaic kernel: a tile of codes is turned, so that the inputs lie along sublanes.

Along sublanes the numbers of a group are one row, repeated without moving lanes. The two codes of a byte are
neighbors along the inputs: the even and the odd inputs have products of their own, for which XLA splits x,
or, if transposed, from which the kernel joins y. Beyond an edge x, the scales and v are zero.

Weights of at least 128 outputs and 256 inputs fit, in groups of a power of two from 16 to 128 or of a whole
row; others take the reference, and so do dtypes other than float32 and bfloat16.
"""

from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from peftjax.kernels.dequantized_matmul import reference, tiles
from peftjax.kernels.dequantized_matmul.element import Table, weight

LANES = 128
WIDEST = 1024
"""Inputs of a tile."""
OUTPUTS = 256
"""Outputs of a tile."""
ROWS = {4: 256, 2: 512}
"""Rows of x in a tile, by the bytes of its dtype: each tile of weights is decoded once for all of them."""


def matmul(
    *operands: Array | None, table: Table | None, group: int, transposed: bool, interpret: bool = False
) -> Array:
    """`reference.matmul`."""
    static = {"table": table, "group": group, "transposed": transposed}
    x, codes = operands[:2]
    if not _fits(x, codes.shape[-2], codes.shape[-1] * (1 if table is None else 2), group):
        return reference.matmul(*operands, **static)
    return tiles.by_matrix(_matmul, operands, **static, interpret=interpret)


def _fits(x: Array, outputs: int, width: int, group: int) -> bool:
    grouped = group == width or group in (16, 32, 64, 128)
    known = x.dtype in (jnp.float32, jnp.bfloat16) and x.size > 0
    return known and grouped and outputs >= LANES and width >= 2 * LANES


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
    n, outputs = x.shape[0], codes.shape[0]
    parts = 1 if table is None else 2  # of the inputs: those of the same bits of a byte
    width = codes.shape[1] * parts
    into = _tile_of_inputs(width, LANES * parts)
    over = OUTPUTS if outputs >= OUTPUTS else LANES
    steps_in, steps_out = pl.cdiv(width, into), pl.cdiv(outputs, over)
    inputs_of_x, outputs_of_y = (steps_out * over, width) if transposed else (steps_in * into, outputs)

    operands = {"x": x, "codes": codes, "scales": scales, "shifts": shifts, "u": u, "v": v}
    operands = {name: array for name, array in operands.items() if array is not None}
    rows = min(ROWS[x.dtype.itemsize], _up_to(n, 16))
    x = _padded(x, max(n, rows), inputs_of_x)
    groups = (1, 1) if group == width else (steps_in, into // group)
    numbers = [_by_steps(array, groups, steps_out * over) for array in (scales, shifts) if array is not None]
    given = {"x": [x] if transposed else _parts(x, parts), "codes": codes, "numbers": numbers}
    if u is not None:
        u, v = tiles.of_one_dtype(u, v)
        v = _parts(_padded(v, v.shape[0], steps_in * into), parts) if transposed else [v]
        given |= {"u": _padded(u, max(n, rows), u.shape[1]), "v": v}

    def of_codes(row: Any, tile: Any, step: Any) -> tuple:
        return (step, tile) if transposed else (tile, step)

    def of_numbers(row: Any, tile: Any, step: Any) -> tuple:
        output, inputs = of_codes(row, tile, step)
        return (0 if group == width else inputs), 0, output

    part = into // parts
    of_x, of_sum, of_y = (over, part, into) if transposed else (part, over, over)
    specs = {
        "x": [pl.BlockSpec((rows, of_x), lambda row, tile, step: (row, step))] * len(given["x"]),
        "codes": pl.BlockSpec((over, part), of_codes),
        "numbers": [pl.BlockSpec((None, groups[1], over), of_numbers)] * len(numbers),
    }
    if u is not None:
        rank = u.shape[1]
        specs["u"] = pl.BlockSpec((rows, rank), lambda row, tile, step: (row, 0))
        specs["v"] = [pl.BlockSpec((rank, of_sum), lambda row, tile, step: (0, tile))] * len(v)
    made = tiles.type_like(x, (x.shape[0], outputs_of_y), x.dtype)
    y = pl.pallas_call(
        partial(_kernel, table, transposed),
        grid=(pl.cdiv(x.shape[0], rows), *((steps_in, steps_out) if transposed else (steps_out, steps_in))),
        in_specs=[specs],
        out_specs=pl.BlockSpec((rows, of_y), lambda row, tile, step: (row, tile)),
        out_shape=made,
        scratch_shapes=[pltpu.VMEM((rows, of_sum), jnp.float32)] * (parts if transposed else 1),
        cost_estimate=tiles.cost(made, operands),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="dequantized_matmul",
    )(given)
    return y[:n]


def _kernel(table: Table | None, transposed: bool, read: dict[str, Any], made: Any, *totals: Any) -> None:
    """A step of a tile of y, summed in float32: one sum for y, or if transposed one for each part of it."""

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
        for total in totals:
            total[...] = jnp.zeros(total.shape, jnp.float32)

    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    for part, w in enumerate(_decode(read["codes"], read["numbers"], table)):
        x, total = (read["x"][0], totals[part]) if transposed else (read["x"][part], totals[0])
        total[...] += lax.dot_general(x[...], w.astype(x.dtype), dims, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def end() -> None:
        values = [total[...] for total in totals]
        if "u" in read:
            u = read["u"][...]
            branches = [jnp.dot(u, v[...], preferred_element_type=jnp.float32) for v in read["v"]]
            values = [value + branch for value, branch in zip(values, branches, strict=True)]
        _store(made, [value.astype(made.dtype) for value in values])


def _store(made: Any, values: list[Array]) -> None:
    """Columns of two arrays in turn, moved by products with zeros and ones: exact, of finite numbers."""
    if len(values) == 1:
        made[...] = values[0]
        return
    precision = lax.Precision.HIGHEST if made.dtype == jnp.float32 else None
    shape = (LANES, 2 * LANES)
    source, target = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    places = [(target == 2 * source + part).astype(made.dtype) for part in (0, 1)]
    for chunk in range(values[0].shape[1] // LANES):
        here = slice(chunk * LANES, (chunk + 1) * LANES)
        even, odd = (
            jnp.dot(value[:, here], place, precision=precision, preferred_element_type=jnp.float32)
            for value, place in zip(values, places)
        )
        made[:, 2 * here.start : 2 * here.stop] = (even + odd).astype(made.dtype)


def _decode(codes: Any, numbers: list[Any], table: Table | None) -> list[Array]:
    """Float32 weights `[inputs, outputs]` of a tile, for each part of the inputs."""
    turned = codes[...].astype(jnp.int32).T
    count = numbers[0].shape[0]
    grouped = turned.reshape(count, turned.shape[0] // count, turned.shape[1])
    scales, shifts = numbers[0][...][:, None], (numbers[1][...][:, None] if len(numbers) > 1 else None)
    parts = [grouped] if table is None else [grouped >> 4, grouped & 15]
    return [weight(part, scales, shifts, table).reshape(turned.shape) for part in parts]


def _by_steps(array: Array, groups: tuple[int, int], outputs: int) -> Array:
    """Numbers `[out, groups]` as float32 `[steps, groups of a step, out]`, zero beyond the weight."""
    return _padded(array.astype(jnp.float32).T, prod(groups), outputs).reshape(*groups, outputs)


def _padded(array: Array, rows: int, columns: int) -> Array:
    missing = rows - array.shape[0], columns - array.shape[1]
    return jnp.pad(array, [(0, count) for count in missing]) if any(missing) else array


def _parts(array: Array, parts: int) -> list[Array]:
    """Every part-th column."""
    return [array[:, part::parts] for part in range(parts)] if parts > 1 else [array]


def _tile_of_inputs(width: int, unit: int) -> int:
    """The widest tile, a multiple of a unit, that divides the inputs filled up to whole units."""
    whole = _up_to(width, unit)
    return max(tile for tile in range(unit, WIDEST + 1, unit) if whole % tile == 0)


def _up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
