"""Queries beside the tokens of a layer: they read its keys and values, and no token reads them.

They stand where the last token of their row is: they see what it sees (order, window and segment), and rotary
positions turn them as it. In an encoder that is every token, wherever they stand.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from peftjax.backbone.attention import Visibility
from peftjax.backbone.context import Context, Rotation


def place_of_queries(context: Context, batch: int, length: int) -> Int[Array, " B"]:
    """`last` of the context, else the last token by `mask`, else the last of all."""
    if context.last is not None:
        return context.last
    if context.mask is not None:
        return jnp.max(jnp.where(context.mask, jnp.arange(length), 0), axis=1)
    return jnp.full(batch, length - 1)


def seen_by_queries(
    context: Context, visible: Visibility, place: Int[Array, " B"], length: int
) -> Bool[Array, "B S"] | None:
    """Which tokens the one at `place` sees; None is all."""
    conditions = [visible.allowed(place, jnp.arange(length)), context.mask]
    if context.segments is not None:
        own = jnp.take_along_axis(context.segments, place[:, None], axis=1)
        conditions.append(context.segments == own)
    given = [condition for condition in conditions if condition is not None]
    return None if not given else jnp.stack(jnp.broadcast_arrays(*given)).all(axis=0)


def rotation_of_queries(rotation: Rotation, place: Int[Array, " B"]) -> Rotation:
    """The rotation [B, 1, h] of every row's token at `place`."""

    def at_place(part: Array) -> Array:
        rows = jnp.broadcast_to(part, (len(place), *part.shape[1:]))
        return jnp.take_along_axis(rows, place[:, None, None], axis=1)

    return jax.tree.map(at_place, rotation)
