"""Structured weights as the operands of a loop over layers or steps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jax import Array

from peftjax.interpreter.uses import draws
from peftjax.weights.base import Weight
from peftjax.weights.dropout import with_number
from peftjax.weights.shared_parts import shared_alone, shares, with_shared_of


def layers_first(xs: Sequence[Any]) -> list[Any] | None:
    """What is scanned, its weights with the scanned axis first; None where one has no such view."""
    moved = [x.stack_first() if isinstance(x, Weight) else x for x in xs]
    return None if any(x is None for x in moved) else moved


def apart(xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What a loop goes through, and what all layers share of it: None of what shares nothing."""
    shared = [shared_alone(x) if isinstance(x, Weight) and shares(x) else None for x in xs]
    return [x if w is None else with_shared_of(x, None) for x, w in zip(xs, shared)], shared


def of_one_layer(xs: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
    """The weights of which each part has lost its first axis, with the arrays that all layers share."""
    own = [x if w is None else with_shared_of(x, w) for x, w in zip(xs, shared)]
    return [x.relabeled(lambda at: at.drop(0)) if isinstance(x, Weight) else x for x in own]


def in_step(operands: Sequence[Any], step: Array | None) -> list[Any]:
    """The operands in one step of a loop; `step` None where no weight among them draws."""
    if step is None:
        return list(operands)
    return [v.with_keys(partial(with_number, number=step)) if draws(v) else v for v in operands]
