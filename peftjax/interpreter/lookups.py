"""Rows of a weight as a plain array: what a model looks up in a table."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.weights.base import Weight, contract
from peftjax.weights.contraction import Gather

_WITHIN = {
    "mode": lax.GatherScatterMode.CLIP,
    "fill_value": None,
    "indices_are_sorted": False,
    "unique_indices": False,
}


def look_up(
    weight: Weight, axis: int, starts: Array, size: int = 1, options: Mapping[str, Any] = _WITHIN
) -> Array | None:
    """`size` members of an input or output axis from each start `[*n, 1]`: `[*n, *axes of the weight]`.

    None where the weight has no lookup along this axis. Several members start where all are inside.
    """
    rule = Gather(axis, tuple(options.items()))
    if not weight.supports(rule):
        return None
    at = starts
    if size > 1:
        first = jnp.clip(starts, 0, weight.shape[axis] - size)
        at = (first + jnp.arange(size, dtype=starts.dtype))[..., None]
    found, lead = contract(at, weight, rule), starts.ndim - 1
    if size > 1:
        return jnp.moveaxis(found, lead, lead + axis)
    return lax.expand_dims(found, (lead + axis,))


def is_table(weight: Weight) -> bool:
    """Whether the weight is one matrix: members of more axes are layers, heads or experts, and no rows."""
    return sorted(weight.layout.letters.replace("1", "")) == ["i", "o"]


def only_member(weight: Weight, axis: int) -> Array | None:
    """A table without an input or output axis of size 1, as a plain array."""
    found = look_up(weight, axis, jnp.zeros((1,), jnp.int32)) if is_table(weight) else None
    return None if found is None else lax.squeeze(found, (axis,))


def as_activation(weight: Weight) -> Array | None:
    """All rows of a table that the model gave an axis of size 1 for the batch; None for another weight."""
    if not is_table(weight) or weight.ndim == 2:
        return None
    (axis,) = weight.layout.positions("i")
    return look_up(weight, axis, jnp.zeros((1,), jnp.int32), weight.shape[axis])
