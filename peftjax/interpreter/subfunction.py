"""A function inside the traced one, such as a jitted or checkpointed block, stays one function."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.core.patterns import fullmatches
from peftjax.interpreter.evaluate import Evaluator
from peftjax.weights.base import Weight


def call_once_traced(
    evaluator: Evaluator,
    eqn: Any,
    operands: list[Any],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> list[Any]:
    """Call the jaxpr of an equation through `wrap`, such as `jax.jit`, traced once for equal structures.

    JAX retraces a function for operands of another structure, and the name of a weight is part of its
    structure. So that twenty layers are one function, the weights go in under the names of their places,
    and what comes out gets the parameters' names back.

    Raises:
        PeftError: what evaluating the jaxpr raises, with the parameters' own names.
    """
    jaxpr = eqn.params["jaxpr"]
    key = (eqn.primitive.name, id(jaxpr))
    if key not in evaluator.functions:
        body = evaluator.call(jaxpr)
        body.__name__ = eqn.params.get("name") or "block"  # what profilers and the compiled text show
        evaluator.functions[key] = (wrap(body), jaxpr)  # with the jaxpr, so that no other gets its id
    function, _ = evaluator.functions[key]
    names: dict[str, str] = {}
    placed = []
    for n, value in enumerate(operands):
        if isinstance(value, Weight) and not _is_named(evaluator.allow_dense, value):
            names[place := f"operand {n}"] = value.layout.name
            value = _renamed(value, {value.layout.name: place})
        placed.append(value)
    try:
        results = function(*placed)
    except PeftError:  # its text has the places
        return evaluator.call(jaxpr)(*operands)
    return [_renamed(result, names) for result in results]


def _is_named(patterns: tuple[str, ...], weight: Weight) -> bool:
    """Whether `allow_dense` names this parameter, which must then keep its name."""
    return any(fullmatches(pattern, weight.layout.name) for pattern in patterns)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if not isinstance(value, Weight):
        return value
    return value.relabeled(lambda layout: replace(layout, name=names.get(layout.name, layout.name)))
