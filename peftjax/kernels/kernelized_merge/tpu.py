"""A walk as a Mosaic kernel: the grid visits tiles in order, and outputs stay in VMEM along a strip."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from peftjax.kernels.kernelized_merge import operands
from peftjax.kernels.kernelized_merge.operands import AXES, Sizes
from peftjax.kernels.kernelized_merge.passes import Axes, Pass

_IN_SMEM = ("scalars", "candidates")


def run(
    walk: Pass,
    given: Mapping[str, Array],
    names: Sequence[str],
    *,
    interpret: bool = False,
    tile: tuple[int, int] = (256, 512),
) -> list[Array]:
    """The outputs of a walk, `[matrices, *axes]`.

    given: arrays under names of `AXES`, the matrices first; names: of the scalars. A tile of at most
    256 x 512 is 0.5 MiB of float32; a matrix that is smaller is one tile.
    """
    size = operands.sizes(given)
    block = {axis: min(most, size[axis]) for axis, most in zip("nm", tile)}
    block["q"] = operands.up_to(size["q"], 8)
    given = operands.padded(given, size, block)
    count = operands.tiles(size, block)
    order = ("m", "n") if walk.along == "m" else ("n", "m")
    shapes = operands.made(walk, given, size, block)
    spec = partial(_spec, block=block, order=order)
    outputs = pl.pallas_call(
        partial(_kernel, walk, tuple(given), tuple(names), size, block, order),
        grid=(size["l"], *(count[axis] for axis in order)),
        in_specs=[spec(AXES[name], array.shape, smem=name in _IN_SMEM) for name, array in given.items()],
        out_specs=[spec(output.axes, made.shape) for output, made in zip(walk.outputs, shapes)],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel" if walk.along == "tile" else "arbitrary")
        ),
        interpret=interpret,
        name=f"kernelized_merge_{walk.name}",
    )(*given.values())
    return operands.cut(walk, outputs, size)


def _spec(axes: Axes, shape: Sequence[int], block: Sizes, order: Sequence[str], smem: bool = False) -> Any:
    def at(matrix: Any, *place: Any) -> tuple:
        tile = dict(zip(order, place))
        return matrix, *(tile.get(axis, 0) for axis in axes)

    lengths = (None, *(block.get(axis, length) for axis, length in zip(axes, shape[1:])))
    return pl.BlockSpec(lengths, at, memory_space=pltpu.SMEM if smem else pltpu.VMEM)


def _kernel(
    walk: Pass,
    given: Sequence[str],
    names: Sequence[str],
    size: Sizes,
    block: Sizes,
    order: Sequence[str],
    *refs: Any,
) -> None:
    read, made = dict(zip(given, refs)), refs[len(given) :]
    valid = operands.valid({axis: pl.program_id(1 + place) for place, axis in enumerate(order)}, size, block)

    def load(name: str, *head: int) -> Array:
        value = read[name][(*head, ...)]
        return jnp.where(valid, value, 0.0) if name == "g" and valid is not None else value

    tile = operands.look(read, names, size, valid, load)
    if walk.along != "tile":

        @pl.when(pl.program_id(2) == 0)
        def start() -> None:
            for ref, output in zip(made, walk.outputs):
                ref[...] = jnp.full(ref.shape, output.initial)

    held = [] if walk.along == "tile" else [ref[...] for ref in made]
    for ref, value in zip(made, walk.step(tile, held)):
        ref[...] = value
