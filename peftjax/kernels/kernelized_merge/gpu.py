"""A walk as a Triton kernel: a program per tile, or per strip of tiles that it walks itself."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from peftjax.kernels.kernelized_merge import operands
from peftjax.kernels.kernelized_merge.operands import AXES, Sizes
from peftjax.kernels.kernelized_merge.passes import Pass, Tile


def run(
    walk: Pass,
    given: Mapping[str, Array],
    names: Sequence[str],
    *,
    interpret: bool = False,
    tile: tuple[int, int] = (16, 128),
) -> list[Array]:
    """The outputs of a walk, `[matrices, *axes]`.

    given: arrays under names of `AXES`, the matrices first; names: of the scalars. tile: how wide a strip
    is and the step along it, powers of two; a narrow strip gives small matrices enough programs.
    """
    size = operands.sizes(given)
    width, along = tile
    block = {"n": along, "m": width} if walk.along == "m" else {"n": width, "m": along}
    block["q"] = max(16, pl.next_power_of_2(size["q"]))  # what a Triton product takes
    given = operands.padded(given, size, block)
    count = operands.tiles(size, block)
    shapes = operands.made(walk, given, size, block)
    outer = ("n", "m") if walk.along == "tile" else (walk.along,)
    outputs = pl.pallas_call(
        partial(_kernel, walk, tuple(given), tuple(names), size, block, outer),
        grid=(*(count[axis] for axis in outer), size["l"]),
        in_specs=[_matrix(array.shape) for array in given.values()],
        out_specs=[_matrix(made.shape) for made in shapes],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"kernelized_merge_{walk.name}",
    )(*given.values())
    return operands.cut(walk, outputs, size)


def _matrix(shape: tuple[int, ...]) -> pl.BlockSpec:
    """All of a matrix, of which a program loads what it needs; the grid's last axis tells which."""
    return pl.BlockSpec((None, *shape[1:]), lambda *at: (at[-1], *(0,) * (len(shape) - 1)))


def _kernel(
    walk: Pass,
    given: Sequence[str],
    names: Sequence[str],
    size: Sizes,
    block: Sizes,
    outer: Sequence[str],
    *refs: Any,
) -> None:
    read, made = dict(zip(given, refs)), refs[len(given) :]
    place = {axis: pl.program_id(d) for d, axis in enumerate(outer)}
    look = partial(_tile, read, names, size, block)
    if walk.along == "tile":
        tile = look(place)
        results = walk.step(tile, [])
        for ref, value, output in zip(made, results, walk.outputs):
            plgpu.store(ref.at[_part(output.axes, place, block)], value, mask=tile.valid)
        return
    (inner,) = {"n", "m"} - {walk.along}
    start = tuple(
        jnp.full([block.get(axis, axis) for axis in output.axes], output.initial) for output in walk.outputs
    )

    def step(at: Array, held: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(walk.step(look(place | {inner: at}), held))

    held = lax.fori_loop(0, operands.tiles(size, block)[inner], step, start)
    for ref, value, output in zip(made, held, walk.outputs):
        plgpu.store(ref.at[_part(output.axes, place, block)], value)


def _tile(
    read: Mapping[str, Any], names: Sequence[str], size: Sizes, block: Sizes, place: dict[str, Array]
) -> Tile:
    valid = operands.valid(place, size, block)

    def load(name: str, *head: int) -> Array:
        part = (*head, *_part(AXES[name][len(head) :], place, block))
        if name == "g" and valid is not None:
            return plgpu.load(read[name].at[part], mask=valid, other=0.0)
        return read[name][part]

    return operands.look(read, names, size, valid, load)


def _part(axes: Sequence[str | int], place: dict[str, Array], block: Sizes) -> tuple:
    """The slices of a tile."""
    return tuple(
        pl.ds(place[axis] * block[axis], block[axis]) if axis in place else slice(None) for axis in axes
    )
