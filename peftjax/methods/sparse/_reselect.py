"""Which trained entries are still trained: chosen again once, and held by the optimizer. Static shapes.

Before the chosen step: keep ← keep and |value| < limit, and the optimizer starts again. Entries that are not
kept are updated by exactly zero.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from peftjax.transform.around import Own, require_given, require_together
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.transform import Loss

KEEP, LIMIT = "keep", "limit"
"""What is held of a weight: which entries are trained, and what a value must be smaller than."""


def limit_of(values: Array, keep: Array, threshold: float | None) -> Array:
    """`[*stack, 1]`: the threshold, or just above the largest kept |value| of each matrix."""
    largest = jnp.max(jnp.where(keep, jnp.abs(values), 0.0), axis=-1, keepdims=True)
    return jnp.nextafter(largest, jnp.inf) if threshold is None else jnp.full_like(largest, threshold)


def hold_dropped() -> optax.GradientTransformationExtraArgs:
    """Zero at the entries that are not kept."""

    def init(params: Own) -> optax.EmptyState:
        require_together("sara", params)
        return optax.EmptyState()

    def update(
        values: Own, state: Any, params: Own | None = None, *, frozen: Frozen | None = None, **extra: Any
    ) -> tuple[Own, Any]:
        held: Mapping[str, Any] = require_given("sara", params, frozen).state
        return {
            path: {name: jnp.where(held[path][KEEP], value, 0) for name, value in slots.items()}
            for path, slots in values.items()
        }, state

    return optax.GradientTransformationExtraArgs(init, update)


def reselect(
    loss: Loss | None,
    frozen: Frozen,
    trainable: Trainable,
    optimizer: OptimizerState,
    *,
    step: Array,
    key: Array,
    part: int,
) -> tuple[Frozen, Trainable, OptimizerState]:
    """Keep the entries that have stayed small, and restart the optimizer of all that is trained.

    The restart resets what it has of the size of the trained values (moments, with the count that corrects
    them); schedules of the learning rate go on.
    """
    held = {
        path: {**own, KEEP: own[KEEP] & (jnp.abs(trainable[path]["values"]) < own[LIMIT])}
        for path, own in frozen.state.items()
    }
    return replace(frozen, state=held), trainable, optimizer.restarted()
