"""The members of a stacked weight, one by one under `vmap`: for what a model does with each of them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax import Array

from peftjax.weights.base import Weight, contract
from peftjax.weights.contraction import Contraction, Dot
from peftjax.weights.shared_parts import mapped_axes

T = TypeVar("T")


def over_stack(fn: Callable[..., T], axes: int) -> Callable[..., T]:
    """A function of one matrix, or of what belongs to it, over so many leading stack axes."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def over_members(
    fn: Callable[..., Any], weight: Weight, position: int, *arrays: Array, axes: Sequence[int | None] = ()
) -> Any:
    """`fn(member, *arrays)` for each member of a stack axis, the results stacked in front.

    None where fn gives None, or the weight has no such members.

    Args:
        fn: gives an array, or None.
        weight: the whole stack.
        position: of the stack axis.
        arrays: what else fn takes.
        axes: of each array, along which its members lie; None where all get the whole.
    """
    order = (position, *(p for p in range(weight.ndim) if p != position))
    moved = weight.transpose(order)
    found = None if moved is None else moved.members()
    if found is None:
        return None
    stacked, mapped = found
    mapped = mapped_axes(stacked) if mapped == 0 else mapped

    def of_one(member: Weight, *values: Array) -> Any:
        return fn(member.relabeled(lambda layout: layout.drop(0)), *values)

    return jax.vmap(of_one, in_axes=(mapped, *axes))(stacked, *arrays)


def true_of_member(question: Callable[[Weight], bool], weight: Weight, position: int) -> bool:
    """The answer for one member of a stack axis, whose arrays are there for their shapes alone."""
    answers: list[bool] = []

    def asked(weight: Weight) -> None:
        over_members(lambda one: answers.append(question(one)), weight, position)

    jax.eval_shape(asked, weight)
    return bool(answers) and answers[0]


def supports_summed(weight: Weight, rule: Contraction) -> bool:
    """Whether `contract_summed` can apply the rule."""
    if weight.supports(rule):
        return True
    position = _summed_stack(weight, rule)
    if position is None:
        return False
    inner = _of_member(rule, position)
    return true_of_member(lambda one: supports_summed(one, inner), weight, position)


def contract_summed(x: Array, weight: Weight, rule: Contraction) -> Array:
    """`contract`, also where a stack axis is summed over that the weight's own rule has no place for."""
    if weight.supports(rule):
        return contract(x, weight, rule)
    position = _summed_stack(weight, rule)
    assert position is not None
    assert isinstance(rule, Dot)
    axis = rule.x_contract[rule.w_contract.index(position)]
    products = over_members(
        lambda one, x: contract_summed(x, one, _of_member(rule, position)), weight, position, x, axes=(axis,)
    )
    return products.sum(0)


def _summed_stack(weight: Weight, rule: Contraction) -> int | None:
    if not isinstance(rule, Dot) or rule.out_sharding is not None:
        return None
    summed = [p for p in rule.w_contract if weight.layout.axes[p].kind == "s"]
    return summed[0] if summed and len(summed) < len(rule.w_contract) else None


def _of_member(rule: Contraction, position: int) -> Dot:
    """The product of one member of a stack axis that the whole one sums over."""
    assert isinstance(rule, Dot)
    axis = rule.x_contract[rule.w_contract.index(position)]

    def without(axes: tuple[int, ...], gone: int) -> tuple[int, ...]:
        return tuple(p - (p > gone) for p in axes if p != gone)

    return Dot(
        x_contract=without(rule.x_contract, axis),
        w_contract=without(rule.w_contract, position),
        x_batch=without(rule.x_batch, axis),
        w_batch=without(rule.w_batch, position),
        weight_first=rule.weight_first,
        precision=rule.precision,
        preferred=rule.preferred,
    )
