"""Prompts of a batch, moved so that all of them end in the last column."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from peftjax.backbone.backbone import Batch
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.models.vocabulary import require_ids

KEYS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Prompt:
    """Tokens with the padding on their left.

    Attributes:
        ids: the tokens, 0 where there is none.
        mask: True where a token is.
        positions: of the tokens.
    """

    ids: Int[Array, "B P"]
    mask: Bool[Array, "B P"]
    positions: Int[Array, "B P"]


def left_padded(batch: Batch) -> Prompt:
    """The prompts with all padding moved to the left, so that every row goes on in the same column.

    Args:
        batch: `input_ids` [B, P] int32, and optionally `attention_mask` [B, P] (1 = token, padded on
            either side; default all tokens) and `position_ids` [B, P] (default: count the tokens).

    Raises:
        PeftError: as `require_prompts`.
    """
    require_prompts(batch)
    ids = jnp.asarray(batch["input_ids"], jnp.int32)
    length = ids.shape[1]
    columns = jnp.arange(length)
    mask = jnp.asarray(batch.get("attention_mask", jnp.ones_like(ids))) != 0
    padding = length - 1 - jnp.max(jnp.where(mask, columns, 0), axis=1)  # on the right

    def moved(rows: Array) -> Array:
        return jnp.take_along_axis(rows, (columns - padding[:, None]) % length, axis=1)

    mask = moved(mask)
    given = batch.get("position_ids")
    counted = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    positions = counted if given is None else moved(jnp.asarray(given))
    # The model reads these without a mask, and the padding may be a token that it lacks.
    return Prompt(jnp.where(mask, moved(ids), 0), mask, positions.astype(jnp.int32))


def require_prompts(batch: Batch, vocab_size: int | None = None) -> None:
    """Check a batch of prompts.

    Args:
        batch: as of `left_padded`.
        vocab_size: of the model, for the token ids.

    Raises:
        PeftError: for another key or shape; and, where nothing is traced, for a token that the model lacks,
            a row without tokens or with padding between tokens.
    """
    for name in batch:
        if name not in KEYS:
            raise PeftError(f"generation has no use for {name!r}; closest: {tree.nearest(name, KEYS)}")
    if "input_ids" not in batch:
        raise PeftError("generation needs a batch with 'input_ids' [B, P]")
    shapes = {name: jnp.shape(value) for name, value in batch.items()}
    shape = shapes["input_ids"]
    if len(shape) != 2 or 0 in shape or set(shapes.values()) != {shape}:
        raise PeftError(f"generation needs arrays [B, P] of one shape, with a token at least, not {shapes}")
    mask = batch.get("attention_mask")
    if vocab_size is not None:
        require_ids(batch["input_ids"], vocab_size, mask)
    if mask is None or isinstance(mask, jax.core.Tracer):
        return
    tokens = np.asarray(mask) != 0
    runs = tokens[:, 0] + (tokens[:, 1:] & ~tokens[:, :-1]).sum(axis=1)
    for row in np.flatnonzero(runs != 1)[:1]:
        what = "has padding between its tokens" if runs[row] else "has no token"
        raise PeftError(f"row {row} of attention_mask {what}; pad on the left or on the right")


def longest(batch: Batch) -> int:
    """One more than the last position of any prompt; where it is traced, the number of columns."""
    mask = batch.get("attention_mask")
    given = batch.get("position_ids")
    if isinstance(mask, jax.core.Tracer) or isinstance(given, jax.core.Tracer):
        return batch["input_ids"].shape[1]
    tokens = np.ones(jnp.shape(batch["input_ids"]), bool) if mask is None else np.asarray(mask) != 0
    return int(tokens.sum(axis=1).max() if given is None else np.asarray(given)[tokens].max() + 1)
