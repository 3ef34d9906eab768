"""Equations in which a weight meets an activation."""

from collections.abc import Callable
from typing import Any

from jax import Array

from peftjax.interpreter.gathers import gathered
from peftjax.kernels.ragged_product import PRODUCT, numbers_of_product
from peftjax.weights.base import Weight, contract
from peftjax.weights.contraction import Contraction, Conv, Dot, RaggedDot


def _apply(x: Any, weight: Any, rule: Contraction) -> Array | None:
    if isinstance(x, Weight) or not isinstance(weight, Weight) or not weight.supports(rule):
        return None
    return contract(x, weight, rule)


def dot_of(eqn: Any, operands: list[Any]) -> tuple[Dot, Any, Any]:
    """The rule of a `dot_general`, the activation and the weight."""
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
    return rule, x, weight


def _dot_general(eqn: Any, operands: list[Any]) -> Array | None:
    rule, x, weight = dot_of(eqn, operands)
    return _apply(x, weight, rule)


def _gather(eqn: Any, operands: list[Any]) -> Any:
    weight, indices = operands
    if not isinstance(weight, Weight):
        return None
    names = ("mode", "fill_value", "indices_are_sorted", "unique_indices")
    options = {name: eqn.params[name] for name in names}
    return gathered(weight, indices, eqn.params["dimension_numbers"], eqn.params["slice_sizes"], options)


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


def _ragged_product(eqn: Any, operands: list[Any]) -> Array | None:
    x, weight, sizes = operands
    numbers = numbers_of_product(eqn.params["transposed"])
    return _apply(x, weight, RaggedDot(sizes, None, eqn.params["preferred"], numbers))


PRODUCTS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv_general_dilated,
    "ragged_dot_general": _ragged_dot_general,
    PRODUCT: _ragged_product,
}
