"""The product as a Mosaic kernel: a tile of codes is turned, so that the inputs lie along sublanes.

Along sublanes the numbers of a group are one row, repeated without moving lanes. The two codes of a byte are
neighbors along the inputs, which are not brought together: the even and the odd inputs have products of
their own, for which XLA splits x, or joins y if transposed. Beyond an edge x and the scales are zero.

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
    rows = min(ROWS[x.dtype.itemsize], _up_to(n, 16))
    steps_in, steps_out = pl.cdiv(width, into), pl.cdiv(outputs, over)

    groups = (1, 1) if group == width else (steps_in, into // group)
    numbers = [_by_steps(array, groups, steps_out * over) for array in (scales, shifts) if array is not None]
    x = _padded(x, _up_to(n, 16) if n < rows else n, (steps_out * over if transposed else steps_in * into))
    low_rank = []
    if u is not None:
        u, v = tiles.of_one_dtype(u, v)
        low_rank = [_padded(u, x.shape[0], u.shape[1]), *(_parts(v, parts) if transposed else [v])]
    xs = [x] if transposed else _parts(x, parts)
    made = [outputs] if not transposed else [width // parts] * parts
    columns = into // parts if transposed else over
    steps = (steps_in, steps_out) if transposed else (steps_out, steps_in)
    at = _Places(transposed, group == width)
    return _joined(
        pl.pallas_call(
            partial(_kernel, table, transposed, len(xs), len(numbers), len(low_rank)),
            grid=(pl.cdiv(x.shape[0], rows), *steps),
            in_specs=[
                *[pl.BlockSpec((rows, over if transposed else into // parts), at.x)] * len(xs),
                pl.BlockSpec((over, into // parts), at.codes),
                *[pl.BlockSpec((None, array.shape[1], over), at.numbers) for array in numbers],
                *[pl.BlockSpec((rows, part.shape[1]), at.u) for part in low_rank[:1]],
                *[pl.BlockSpec((part.shape[0], columns), at.v) for part in low_rank[1:]],
            ],
            out_specs=[pl.BlockSpec((rows, columns), at.y)] * len(made),
            out_shape=[tiles.type_like(x, (x.shape[0], length), x.dtype) for length in made],
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)] * len(made),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
            name="dequantized_matmul",
        )(*xs, codes, *numbers, *low_rank),
        n,
    )


class _Places:
    """Which block of each array a program has: its rows, its tile of y, and its step along the sum."""

    def __init__(self, transposed: bool, one_group: bool) -> None:
        self.transposed, self.one_group = transposed, one_group

    def x(self, row: Any, tile: Any, step: Any) -> tuple:
        return row, step

    def codes(self, row: Any, tile: Any, step: Any) -> tuple:
        return (step, tile) if self.transposed else (tile, step)

    def numbers(self, row: Any, tile: Any, step: Any) -> tuple:
        output, inputs = self.codes(row, tile, step)
        return (0 if self.one_group else inputs), 0, output

    def u(self, row: Any, tile: Any, step: Any) -> tuple:
        return row, 0

    def v(self, row: Any, tile: Any, step: Any) -> tuple:
        return 0, tile

    def y(self, row: Any, tile: Any, step: Any) -> tuple:
        return row, tile


def _kernel(
    table: Table | None, transposed: bool, num_x: int, num_numbers: int, num_low_rank: int, *refs: Any
) -> None:
    given = iter(refs)
    xs = [next(given) for _ in range(num_x)]
    codes = next(given)
    numbers = [next(given) for _ in range(num_numbers)]
    low_rank = [next(given) for _ in range(num_low_rank)]
    rest = list(given)
    made, totals = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
        for total in totals:
            total[...] = jnp.zeros(total.shape, jnp.float32)

    dtype = xs[0].dtype
    for part, w in enumerate(_decode(codes, numbers, table)):
        x, total = (xs[0], totals[part]) if transposed else (xs[part], totals[0])
        dims = (((1,), (1,)), ((), ())) if transposed else (((1,), (0,)), ((), ()))
        total[...] += lax.dot_general(x[...], w.astype(dtype), dims, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def end() -> None:
        for part, (y, total) in enumerate(zip(made, totals)):
            value = total[...]
            if low_rank:
                value += jnp.dot(
                    low_rank[0][...], low_rank[1 + part][...], preferred_element_type=jnp.float32
                )
            y[...] = value.astype(y.dtype)


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


def _joined(made: list[Array], n: int) -> Array:
    made = [array[:n] for array in made]
    return jnp.stack(made, -1).reshape(n, -1) if len(made) > 1 else made[0]


def _tile_of_inputs(width: int, unit: int) -> int:
    """The widest tile, a multiple of a unit, that divides the inputs filled up to whole units."""
    whole = _up_to(width, unit)
    return max(tile for tile in range(unit, WIDEST + 1, unit) if whole % tile == 0)


def _up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
