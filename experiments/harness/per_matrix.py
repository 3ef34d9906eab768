"""`optax.contrib.galore` on stacked layers, which it leaves alone as they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import GaLoreDimensionNumbers

STACK_AXES = 3
"""Of a block's stacked matrices `[L, in, out]`; norms, embedding and output layer have fewer."""


def per_matrix(
    learning_rate: optax.ScalarOrSchedule, *, rank: int, every: int, scale: float
) -> optax.GradientTransformation:
    """`optax.contrib.galore` that projects every matrix of the blocks, and nothing else.

    By itself it projects arrays of two axes only: of a backbone's parameters the embedding, the output layer
    and the stacked norms, and no stacked matrix. So `[L, in, out]` is given to it as L arrays, and only those
    are named to it.

    Args:
        learning_rate: a number or a schedule.
        rank: of the projection.
        every: steps between projections.
        scale: of what is projected back.
    """
    inner = optax.contrib.galore(
        learning_rate,
        rank=rank,
        update_proj_gap=every,
        scale=scale,
        weight_dimension_numbers=_matrices,
    )

    def init(params: dict[str, jax.Array]) -> Any:
        return inner.init(_split(params))

    def update(
        updates: dict[str, jax.Array], state: Any, params: dict[str, jax.Array] | None = None
    ) -> tuple[dict[str, jax.Array], Any]:
        own = None if params is None else _split(params)
        updates, state = inner.update(_split(updates), state, own)
        joined = {
            path: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf for path, leaf in updates.items()
        }
        return joined, state

    return optax.GradientTransformation(init, update)


def _split(tree: dict[str, jax.Array]) -> dict[str, Any]:
    return {path: tuple(leaf) if leaf.ndim == STACK_AXES else leaf for path, leaf in tree.items()}


def _matrices(tree: dict[str, Any]) -> dict[str, Any]:
    """Which arrays are projected, for `optax.contrib.galore`."""
    numbers = GaLoreDimensionNumbers()
    return {path: (numbers,) * len(leaf) if isinstance(leaf, tuple) else None for path, leaf in tree.items()}
