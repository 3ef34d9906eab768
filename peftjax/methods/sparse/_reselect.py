"""Which entries are still trained: reduced once, the others held fixed by the optimizer. Static shapes.

Before the chosen step: keep ← keep and |value| < limit, and the optimizer's moments are reset. Entries that
are not kept are updated by exactly zero.
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
"""The arrays of `frozen.state` of a weight: which entries are trained, and the bound on a value."""


def limit_of(values: Array, keep: Array, threshold: float | None) -> Array:
    """`[*stack, 1]`: the threshold, or just above the largest kept |value| of each matrix."""
    largest = jnp.max(jnp.where(keep, jnp.abs(values), 0.0), axis=-1, keepdims=True)
    return jnp.nextafter(largest, jnp.inf) if threshold is None else jnp.full_like(largest, threshold)


def hold_dropped() -> optax.GradientTransformationExtraArgs:
    """Zero the updates of the entries that are not kept."""

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
    """Keep the entries that have stayed small, and reset the optimizer's moments of all that is trained.

    The count that corrects them is reset too; schedules of the learning rate go on.
    """
    held = {
        path: {**own, KEEP: own[KEEP] & (jnp.abs(trainable[path]["values"]) < own[LIMIT])}
        for path, own in frozen.state.items()
    }
    return replace(frozen, state=held), trainable, optimizer.restarted()
