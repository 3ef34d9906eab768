"""Equations in which a weight meets an activation."""

from collections.abc import Callable
from typing import Any

from jax import Array, lax

from peftjax.adapt.lookups import is_table, look_up
from peftjax.weights.base import Weight, contract
from peftjax.weights.rules import Conv, Dot, RaggedDot, Rule


def _apply(x: Any, weight: Any, rule: Rule) -> Array | None:
    if isinstance(x, Weight) or not isinstance(weight, Weight) or not weight.supports(rule):
        return None
    return contract(x, weight, rule)


def _dot_general(eqn: Any, operands: list[Any]) -> Array | None:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    weight_first = isinstance(operands[0], Weight)
    contracted, batch = (
        ((right, left), (right_batch, left_batch))
        if weight_first
        else (
            (left, right),
            (left_batch, right_batch),
        )
    )
    rule = Dot(
        x_contract=tuple(contracted[0]),
        w_contract=tuple(contracted[1]),
        x_batch=tuple(batch[0]),
        w_batch=tuple(batch[1]),
        weight_first=weight_first,
        precision=eqn.params["precision"],
        preferred=eqn.params["preferred_element_type"],
        out_sharding=eqn.params.get("out_sharding"),
    )
    x, weight = reversed(operands) if weight_first else operands
    return _apply(x, weight, rule)


def _gather(eqn: Any, operands: list[Any]) -> Any:
    weight, indices = operands
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    names = ("mode", "fill_value", "indices_are_sorted", "unique_indices")
    options = {name: eqn.params[name] for name in names}
    if not isinstance(weight, Weight) or numbers.operand_batching_dims:
        return None
    mapped = numbers.start_index_map
    cut = mapped if len(mapped) == 1 else tuple(p for p in mapped if sizes[p] < weight.shape[p])
    if len(cut) != 1 or any(n != weight.shape[p] for p, n in enumerate(sizes) if p != cut[0]):
        return None
    (axis,) = cut
    if len(mapped) > 1 and weight.layout.axes[axis].kind != "s" and not is_table(weight):
        return None
    clips = options["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if (len(mapped) > 1 or sizes[axis] != 1) and not clips:
        return None  # a start outside may fill the whole slice
    starts = indices[..., mapped.index(axis) : mapped.index(axis) + 1]
    batch = indices.ndim - 1
    rest = tuple(p for p in range(weight.ndim) if p not in numbers.collapsed_slice_dims)
    if weight.layout.axes[axis].kind == "s":
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


def _conv_general_dilated(eqn: Any, operands: list[Any]) -> Array | None:
    x, weight = operands
    if eqn.params["batch_group_count"] != 1:
        return None
    names = (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "precision",
        "preferred_element_type",
    )
    rule = Conv(
        eqn.params["dimension_numbers"],
        tuple((name, eqn.params[name]) for name in names),
        eqn.params["feature_group_count"],
    )
    return _apply(x, weight, rule)


def _ragged_dot_general(eqn: Any, operands: list[Any]) -> Array | None:
    x, weight, group_sizes = operands
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if len(numbers.rhs_group_dimensions) != 1 or eqn.params["group_offset"] is not None:
        return None
    rule = RaggedDot(group_sizes, eqn.params["precision"], eqn.params["preferred_element_type"], numbers)
    return _apply(x, weight, rule)


PRODUCTS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv_general_dilated,
    "ragged_dot_general": _ragged_dot_general,
}
