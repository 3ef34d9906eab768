"""Rows and single entries of an array in any layout, by their numbers in the canonical form.

Rows are numbered along the inputs and columns along the outputs, all axes of a side taken together. A
number past the end is no place at all: reading it gives zeros and writing it does nothing.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.weights.layout import Layout, Side
from peftjax.weights.sharding import keeping

NOWHERE = 2**31 - 1
"""The number of a row that is in no matrix."""


def numbered_in(numbers: Array, cut: range) -> Array:
    """Places along an axis as they are numbered in a slice of it; those outside become `NOWHERE`."""
    shifted = numbers - cut.start
    inside = (numbers >= cut.start) & (numbers < cut.stop) & (shifted % cut.step == 0)
    return jnp.where(inside, shifted // cut.step, NOWHERE)


def numbered_backwards(numbers: Array, layout: Layout, position: int) -> Array:
    """Places along a side as they are numbered when one of its axes is reversed."""
    side = layout.axes[position].kind
    sizes, place = layout.sizes(side), layout.positions(side).index(position)
    step, size = math.prod(sizes[place + 1 :]), sizes[place]
    along = numbers // step % size
    return jnp.where(numbers < math.prod(sizes), numbers + (size - 1 - 2 * along) * step, numbers)


def take_rows(w: Array, rows: Array, layout: Layout) -> Array:
    """Rows `[*stack, r]` of an array in this layout: `[*stack, r, out]`, zeros past the end."""
    index, lead, order = _row_index(layout, rows)
    kept = keeping(w, (*order[:lead], *layout.positions("s"), None, *order[lead:]))
    found = w.at[index].get(mode="fill", fill_value=0, out_sharding=kept)
    n = found.ndim - len(order)
    # The indexed axes stand together, behind `lead` output axes: bring them to the front.
    found = jnp.moveaxis(found, range(lead, lead + n), range(n))
    found = lax.transpose(found, (*range(n), *(n + order.index(p) for p in layout.positions("o"))))
    return found.reshape(*rows.shape, -1)


def put_rows(w: Array, rows: Array, values: Array, layout: Layout) -> Array:
    """`w` with rows `[*stack, r]` exchanged for `values [*stack, r, out]`; those past the end are none."""
    index, lead, order = _row_index(layout, rows)
    outputs = layout.positions("o")
    values = values.reshape(*rows.shape, *layout.sizes("o"))
    values = lax.transpose(values, (*range(rows.ndim), *(rows.ndim + outputs.index(p) for p in order)))
    values = jnp.moveaxis(values, range(rows.ndim), range(lead, lead + rows.ndim))
    return _put(w, index, values)


def take_entries(w: Array, rows: Array, columns: Array, layout: Layout) -> Array:
    """Entries (row, column) `[*stack, K]` of an array in this layout, zeros past the end."""
    kept = keeping(w, (None,) * rows.ndim)
    return w.at[_entry_index(layout, rows, columns)].get(mode="fill", fill_value=0, out_sharding=kept)


def put_entries(w: Array, rows: Array, columns: Array, values: Array, layout: Layout) -> Array:
    """`w` with distinct entries (row, column) exchanged for `values [*stack, K]`; past the end is none."""
    index = _entry_index(layout, rows, columns)
    return _put(w, index, values)


def _put(w: Array, index: tuple[Any, ...], values: Array) -> Array:
    kept = keeping(w, range(w.ndim))
    as_is: dict[str, Any] = {} if kept is None else {"out_sharding": kept}
    return w.at[index].set(values.astype(w.dtype), mode="drop", unique_indices=True, **as_is)


def _row_index(layout: Layout, rows: Array) -> tuple[tuple[Any, ...], int, list[int]]:
    """What indexes the rows, how many output axes come before them in the result, and the output axes."""
    index: list[Any] = [slice(None)] * len(layout.axes)
    for p, part in (_parts(layout, "i", rows) | _members(layout)).items():
        index[p] = part
    indexed = [p for p, part in enumerate(index) if not isinstance(part, slice)]
    together = indexed[-1] - indexed[0] + 1 == len(indexed)
    order = [p for p in range(len(index)) if p not in indexed]
    return tuple(index), indexed[0] if together else 0, order


def _entry_index(layout: Layout, rows: Array, columns: Array) -> tuple[Array, ...]:
    parts = _parts(layout, "i", rows) | _parts(layout, "o", columns) | _members(layout)
    return tuple(parts[p] for p in range(len(layout.axes)))


def _parts(layout: Layout, side: Side, flat: Array) -> dict[int, Array]:
    """Flat positions along a side as positions along each of its axes; past the end stays past it."""
    parts = {}
    for p in reversed(layout.positions(side)[1:]):
        flat, parts[p] = jnp.divmod(flat, layout.shape[p])
    return parts | {layout.positions(side)[0]: flat}


def _members(layout: Layout) -> dict[int, Array]:
    """Every member of the stack, and the only place of a unit axis, broadcastable to `[*stack, 1]`."""
    stack = layout.positions("s")
    members = {p: lax.broadcasted_iota(jnp.int32, (*layout.stack, 1), place) for place, p in enumerate(stack)}
    return members | {p: jnp.zeros((1,), jnp.int32) for p in layout.positions("1")}
