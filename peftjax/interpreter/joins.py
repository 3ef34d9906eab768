"""Equations that make one weight of several, or mix its axes: what comes out acts part by part.

They are evaluated where the user does not accept the dense array.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from peftjax.interpreter.products import dot_of
from peftjax.interpreter.views import reordered
from peftjax.weights.base import Weight
from peftjax.weights.concatenated import concatenated
from peftjax.weights.merged import regrouped
from peftjax.weights.mixture import mixed_by
from peftjax.weights.stack_members import contract_summed, supports_summed
from peftjax.weights.views import reshape


def _concatenate(eqn: Any, operands: list[Any]) -> Any:
    return concatenated(operands, eqn.params["dimension"])


def _stack(eqn: Any, operands: list[Any]) -> Any:
    # jax 0.10 and newer: `jnp.stack`.
    axis = eqn.params["axis"]
    parts = [reshape(part, (*part.shape[:axis], 1, *part.shape[axis:])) for part in operands]
    return None if any(part is None for part in parts) else concatenated(parts, axis)


def _reshape(eqn: Any, operands: list[Any]) -> Any:
    weight = reordered(eqn, operands)
    return None if weight is None else regrouped(weight, eqn.params["new_sizes"])


def _dot_general(eqn: Any, operands: list[Any]) -> Any:
    """Experts that are chosen or mixed by coefficients, or summed over with their inputs."""
    rule, x, weight = dot_of(eqn, operands)
    if isinstance(x, Weight) or not isinstance(weight, Weight) or not weight.may_mix:
        return None
    if supports_summed(weight, rule):
        return contract_summed(x, weight, rule)
    kinds = [weight.layout.axes[p].kind for p in rule.w_contract]
    if kinds != ["s"] or rule.w_batch or not jnp.issubdtype(weight.dtype, jnp.floating):
        return None
    coefficients = jnp.moveaxis(x, rule.x_contract[0], -1)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        coefficients = coefficients.astype(jnp.float32)
    (out,) = eqn.outvars
    mixture = mixed_by(weight, coefficients, rule.w_contract[0], not rule.weight_first)
    return mixture if mixture is None or mixture.dtype == out.aval.dtype else mixture.cast(out.aval.dtype)


def _reduce_sum(eqn: Any, operands: list[Any]) -> Any:
    """The sum, or the mean, of experts."""
    (weight,), axes = operands, eqn.params["axes"]
    if len(axes) != 1 or weight.layout.axes[axes[0]].kind != "s":
        return None
    return mixed_by(weight, jnp.ones(weight.shape[axes[0]], jnp.float32), axes[0], True)


JOINS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "concatenate": _concatenate,
    "stack": _stack,
    "reshape": _reshape,
    "reduce_sum": _reduce_sum,
    "dot_general": _dot_general,
}
