"""The products in tiles of rows, each with the matrix of its group."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import compat

SMALLEST, LARGEST = 64, 1024
"""Rows of a tile."""


def tile_rows(rows: int, groups: int) -> int:
    """How many rows a tile has: half of what a group has, or up to half less.

    More rows read the matrix of a group less often, and fewer leave less of the last tile of a group empty.
    """
    half = max(1, rows // (2 * groups))
    return min(LARGEST, max(SMALLEST, 1 << (half.bit_length() - 1)))


def _tiles(rows: int, sizes: Array, tile: int) -> tuple[Array, Array, Array, Array]:
    """Of each tile its first row, its group and how many rows of that it has; how many tiles have some."""
    filled = min(rows, len(sizes))
    numbers = jnp.arange(filled + (rows - filled) // tile)
    ends, counts = jnp.cumsum(sizes), -(-sizes // tile)
    last = jnp.cumsum(counts)
    group = jnp.minimum(jnp.sum(last[None] <= numbers[:, None], axis=1), len(sizes) - 1)
    within = numbers - (last - counts)[group]
    first = (ends - sizes)[group] + within * tile
    used = numbers < last[-1]
    first = jnp.where(used, first, rows)
    return first, group, jnp.where(used, jnp.minimum(ends[group] - first, tile), 0), last[-1]


def product(
    x: Array,
    parts: Any,
    sizes: Array,
    *,
    decode: Callable[[Any], Array],
    transposed: bool,
    preferred: Any,
) -> Array:
    """`ragged_product`, a tile after the other, with the matrix that `decode` makes of its group's parts."""
    rows, tile = len(x), tile_rows(len(x), len(sizes))
    first, group, _, used = _tiles(rows, sizes, tile)
    whole = jnp.pad(x, ((0, tile), (0, 0)))
    over = (((1,), (1 if transposed else 0,)), ((), ()))

    def matrix(group: Array) -> Array:
        return decode(jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, group, keepdims=False), parts))

    def step(number: Array, y: Array) -> Array:
        own = lax.dynamic_slice_in_dim(whole, first[number], tile)
        product = lax.dot_general(own, matrix(group[number]), over, preferred_element_type=preferred)
        return lax.dynamic_update_slice_in_dim(y, product, first[number], 0)

    width = jax.eval_shape(matrix, group[0]).shape[0 if transposed else 1]
    empty = _alike(jnp.zeros((rows + tile, width), preferred), x)
    y = lax.fori_loop(0, used, step, empty)[:rows]
    return jnp.where((jnp.arange(rows) < sizes.sum())[:, None], y, jnp.zeros((), preferred))


def outer(x: Array, g: Array, sizes: Array, *, preferred: Any) -> list[Array]:
    """`ragged_outer`, a tile after the other; summed in float32 at least."""
    rows, tile = len(x), tile_rows(len(x), len(sizes))
    first, group, count, used = _tiles(rows, sizes, tile)
    x, g = (jnp.pad(array, ((0, tile), (0, 0))) for array in (x, g))

    def step(number: Array, total: Array) -> Array:
        of_x, of_g = (lax.dynamic_slice_in_dim(array, first[number], tile) for array in (x, g))
        inside = (jnp.arange(tile) < count[number])[:, None]
        # Of both: zero times what is not finite elsewhere would be no zero.
        of_x, of_g = (jnp.where(inside, part, jnp.zeros((), part.dtype)) for part in (of_x, of_g))
        product = lax.dot_general(of_x, of_g, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype)
        before = lax.dynamic_index_in_dim(total, group[number], keepdims=False)
        return lax.dynamic_update_index_in_dim(total, before + product, group[number], 0)

    wide = jnp.promote_types(preferred, jnp.float32)
    empty = _alike(jnp.zeros((len(sizes), x.shape[1], g.shape[1]), wide), x)
    return [lax.fori_loop(0, used, step, empty).astype(preferred)]


def _alike(empty: Array, x: Array) -> Array:
    """An array that varies over the devices of a `shard_map` as x does."""
    return compat.varying_alike((empty, x))[0]
