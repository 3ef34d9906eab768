"""The arrays of a walk: which axes they have, cut into tiles and padded to whole ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.kernels.kernelized_merge.passes import Axes, Pass, Tile

# Behind the axis of the matrices; "c" is as many as there are.
AXES: dict[str, Axes] = {
    "rows": ("p", "n", "q"),
    "columns": ("p", "q", "m"),
    "scalars": (1, "c"),
    "candidates": (1, "c"),
    "log_sum": ("n", 1),
    "row_sum": ("n", 1),
    "g": ("n", "m"),
}
Sizes = dict[str, int]


def sizes(given: Mapping[str, Array]) -> Sizes:
    """The sizes of the named axes."""
    matrices, heads, n, q = given["rows"].shape
    return {"l": matrices, "p": heads, "n": n, "q": q, "m": given["columns"].shape[-1]}


def tiles(size: Sizes, block: Sizes) -> Sizes:
    """How many tiles the inputs and the outputs are cut into."""
    return {axis: -(-size[axis] // block[axis]) for axis in ("n", "m")}


def padded(given: Mapping[str, Array], size: Sizes, block: Sizes) -> dict[str, Array]:
    """All but g padded with zeros to whole tiles, and to the block's rank."""
    whole = {axis: count * block[axis] for axis, count in tiles(size, block).items()} | {"q": block["q"]}

    def fill(name: str, array: Array) -> Array:
        missing = [whole.get(axis, length) - length for axis, length in zip(AXES[name], array.shape[1:])]
        return jnp.pad(array, [(0, 0), *((0, count) for count in missing)]) if any(missing) else array

    return {name: array if name == "g" else fill(name, array) for name, array in given.items()}


def made(walk: Pass, given: Mapping[str, Array], size: Sizes, block: Sizes) -> list[jax.ShapeDtypeStruct]:
    """The types of a walk's outputs: what is carried along a strip comes in whole tiles.

    In a `shard_map` they vary over the mesh axes that what is given varies over.
    """
    whole = {axis: count * block[axis] for axis, count in tiles(size, block).items()} | {"q": block["q"]}
    length = size if walk.along == "tile" else whole

    def outputs(given: Mapping[str, Array]) -> list[Array]:
        zero = sum(array.ravel()[0] * 0.0 for array in given.values())
        shapes = [(size["l"], *(length.get(axis, axis) for axis in output.axes)) for output in walk.outputs]
        return [jnp.full(shape, zero, output.initial.dtype) for shape, output in zip(shapes, walk.outputs)]

    return jax.eval_shape(outputs, given)


def cut(walk: Pass, outputs: list[Array], size: Sizes) -> list[Array]:
    """The outputs without the padding."""
    ends = [tuple(slice(size.get(axis, axis)) for axis in output.axes) for output in walk.outputs]
    return [array[(slice(None), *end)] for array, end in zip(outputs, ends)]


def look(
    refs: Mapping[str, Any],
    names: Sequence[str],
    size: Sizes,
    valid: Array | None,
    load: Callable[..., Array],
) -> Tile:
    """A kernel's tile. load: of a name, and of the head where the array has heads; names: of scalars."""

    def numbers(name: str) -> list[Array]:
        return [refs[name][0, k] for k in range(refs[name].shape[-1])] if name in refs else []

    return Tile(
        rows=[load("rows", p) for p in range(size["p"])],
        columns=[load("columns", p) for p in range(size["p"])],
        scalars=dict(zip(names, numbers("scalars"))),
        candidates=numbers("candidates"),
        valid=valid,
        **{name: load(name) if name in refs else None for name in ("log_sum", "row_sum", "g")},
    )


def valid(place: Mapping[str, Array], size: Sizes, block: Sizes) -> Array | None:
    """Where the tile at `place` lies in the matrix; None when no tile reaches beyond it."""
    if all(size[axis] % block[axis] == 0 for axis in "nm"):
        return None
    shape = (block["n"], block["m"])
    rows, columns = (
        place[axis] * block[axis] + lax.broadcasted_iota(jnp.int32, shape, d) for d, axis in enumerate("nm")
    )
    return (rows < size["n"]) & (columns < size["m"])


def up_to(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple
