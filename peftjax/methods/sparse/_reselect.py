"""Steering which trained entries are still trained, in the optimizer: static shapes, no new program.

At the chosen step, before its update: keep ← keep · 1[|value| < limit], and the optimizer starts again.
Entries that are not kept are updated by exactly zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.transform.transform import at_prefix, own_at, require_together


class ReselectState(NamedTuple):
    """The optimizer's own state, the updates done, and by path what a value must be smaller than."""

    inner: Any
    count: Array
    limit: dict[str, Array]


def reselecting(
    tx: optax.GradientTransformation, prefix: tuple[str, ...], at: int | None, threshold: float | None
) -> optax.GradientTransformation:
    """`tx` on the entries with `keep = 1` alone, selected again before update number `at` (from 0).

    The start again resets what `tx` has of the size of the trained values (moments, with the count that
    corrects them), for all that it trains; schedules of the learning rate go on.

    Args:
        tx: the user's.
        prefix: where `{path: {"values", "keep"}}` lies in the trainable.
        at: None never selects again.
        threshold: the limit; None takes that of the start, just above the largest kept |value| of each
            matrix when the optimizer's state is made.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> ReselectState:
        own = own_at(params, prefix)
        require_together("sara", own)
        limit = {path: _limit(slots, threshold) for path, slots in own.items()}
        return ReselectState(tx.init(params), jnp.zeros((), jnp.int32), limit)

    def update(
        gradients: Any, state: ReselectState, params: Any = None, **extra: Any
    ) -> tuple[Any, ReselectState]:
        if params is None:
            raise PeftError(
                "sara: its optimizer reads the values; call tx.update(gradients, state, trainable)"
            )
        own, inner = own_at(params, prefix), state.inner
        keep = {path: slots["keep"] for path, slots in own.items()}
        if at is not None:
            due = state.count == at
            keep = {
                path: jnp.where(due & (jnp.abs(own[path]["values"]) >= state.limit[path]), 0.0, old)
                for path, old in keep.items()
            }
            inner = _restarted(inner, tx.init(params), params, due)

        def masked(slots_of: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
            return {p: {**s, "values": jnp.where(keep[p] > 0, s["values"], 0)} for p, s in slots_of.items()}

        def steered(slots_of: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
            return {p: {**s, "keep": keep[p] - own[p]["keep"]} for p, s in masked(slots_of).items()}

        updates, inner = tx.update(at_prefix(gradients, prefix, masked), inner, params, **extra)
        return at_prefix(updates, prefix, steered), ReselectState(inner, state.count + 1, state.limit)

    return optax.GradientTransformationExtraArgs(init, update)


def _limit(slots: dict[str, Array], threshold: float | None) -> Array:
    """`[*stack, 1]`."""
    sizes = jnp.where(slots["keep"] > 0, jnp.abs(slots["values"]), 0.0)
    largest = jnp.max(sizes, axis=-1, keepdims=True)
    return jnp.nextafter(largest, jnp.inf) if threshold is None else jnp.full_like(largest, threshold)


def _restarted(state: Any, fresh: Any, params: Any, due: Array) -> Any:
    """The state with every node that has a field like `params` made fresh when due."""
    structure = jax.tree.structure(params)

    def has_moments(node: Any) -> bool:
        fields = node if isinstance(node, tuple) and hasattr(node, "_fields") else ()
        return any(jax.tree.structure(field) == structure for field in fields)

    def restart(old: Any, new: Any) -> Any:
        if not has_moments(old):
            return old
        return jax.tree.map(lambda old, new: jnp.where(due, new, old), old, new)

    return jax.tree.map(restart, state, fresh, is_leaf=has_moments)
