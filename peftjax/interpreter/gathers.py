"""`gather`: rows of a table, members of a stack, and rows of every table of an ensemble."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.interpreter.lookups import is_table, look_up
from peftjax.weights.base import Weight
from peftjax.weights.stack_members import over_members


def gathered(
    weight: Weight,
    indices: Array,
    numbers: lax.GatherDimensionNumbers,
    sizes: tuple[int, ...],
    options: dict[str, Any],
) -> Any:
    """`lax.gather` of a weight: a weight where members of a stack are taken, else an array.

    None where there is no lookup of this kind.
    """
    if numbers.operand_batching_dims:
        return _each_with_its_own(weight, indices, numbers, sizes, options)
    mapped = numbers.start_index_map
    cut = mapped if len(mapped) == 1 else tuple(p for p in mapped if sizes[p] < weight.shape[p])
    if len(cut) != 1 or any(n != weight.shape[p] for p, n in enumerate(sizes) if p != cut[0]):
        return None
    (axis,) = cut
    kinds = [a.kind for a in weight.layout.axes]
    whole = [p for p, kind in enumerate(kinds) if kind == "s" and p not in mapped]
    if kinds[axis] != "s" and whole:
        return _each_with_all(weight, indices, numbers, sizes, options, whole[0])
    if len(mapped) > 1 and kinds[axis] != "s" and not is_table(weight):
        return None
    clips = options["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if (len(mapped) > 1 or sizes[axis] != 1) and not clips:
        return None  # a start outside may fill the whole slice
    starts = indices[..., mapped.index(axis) : mapped.index(axis) + 1]
    batch = indices.ndim - 1
    rest = tuple(p for p in range(weight.ndim) if p not in numbers.collapsed_slice_dims)
    if kinds[axis] == "s":
        plain = numbers.collapsed_slice_dims == (axis,)
        plain = plain and numbers.offset_dims == tuple(range(batch, batch + len(rest)))
        return weight.take_stack(axis, starts, tuple(options.items())) if plain else None
    found = look_up(weight, axis, starts, sizes[axis], options)
    if found is None:
        return None
    found = lax.squeeze(found, [batch + p for p in numbers.collapsed_slice_dims])
    order: list[int] = [*range(batch)]
    for offset, n in zip(numbers.offset_dims, range(batch, batch + len(rest))):
        order.insert(offset, n)
    return lax.transpose(found, order)


def _each_with_its_own(
    weight: Weight,
    indices: Array,
    numbers: lax.GatherDimensionNumbers,
    sizes: tuple[int, ...],
    options: dict[str, Any],
) -> Array | None:
    """Members of a stack, each looked up at its own places: `vmap` over both."""
    (position, *others), (axis, *axes) = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    if weight.layout.axes[position].kind != "s":
        return None
    ndim = indices.ndim - 1 + len(numbers.offset_dims)
    out = [p for p in range(ndim) if p not in numbers.offset_dims][axis]
    inner = _numbers_without(
        numbers,
        position,
        offset_dims=_without(numbers.offset_dims, out),
        operand_batching_dims=tuple(others),
        start_indices_batching_dims=_without(axes, axis),
    )
    found = over_members(
        lambda one, indices: _array(gathered(one, indices, inner, _drop(sizes, position), options)),
        weight,
        position,
        indices,
        axes=(axis,),
    )
    return None if found is None else jnp.moveaxis(found, 0, out)


def _each_with_all(
    weight: Weight,
    indices: Array,
    numbers: lax.GatherDimensionNumbers,
    sizes: tuple[int, ...],
    options: dict[str, Any],
    position: int,
) -> Array | None:
    """Every member of a stack, looked up at the same places."""
    kept = [p for p in range(weight.ndim) if p not in numbers.collapsed_slice_dims]
    out = numbers.offset_dims[kept.index(position)] if position in kept else None
    offset_dims = numbers.offset_dims if out is None else _without(numbers.offset_dims, out)
    inner = _numbers_without(numbers, position, offset_dims=offset_dims)
    found = over_members(
        lambda one: _array(gathered(one, indices, inner, _drop(sizes, position), options)), weight, position
    )
    if found is None:
        return None
    return found[0] if out is None else jnp.moveaxis(found, 0, out)


def _numbers_without(
    numbers: lax.GatherDimensionNumbers, position: int, **changes: Any
) -> lax.GatherDimensionNumbers:
    """The numbers of a lookup in the operand without the axis `position`."""
    inner = numbers._replace(**changes)
    return inner._replace(
        collapsed_slice_dims=_without(inner.collapsed_slice_dims, position),
        start_index_map=_without(inner.start_index_map, position),
        operand_batching_dims=_without(inner.operand_batching_dims, position),
    )


def _without(axes: Any, gone: int) -> tuple[int, ...]:
    return tuple(p - (p > gone) for p in axes if p != gone)


def _drop(sizes: tuple[int, ...], position: int) -> tuple[int, ...]:
    return (*sizes[:position], *sizes[position + 1 :])


def _array(found: Any) -> Any:
    return None if isinstance(found, Weight) else found
