"""Ids of rows of a table, such as token ids of the vocabulary: checked where they are filled or read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from peftjax.backbone.backbone import Batch
from peftjax.core.errors import PeftError


def require_ids(
    ids: ArrayLike, size: int, mask: ArrayLike | None = None, *, name: str = "input_ids", remedy: str = ""
) -> None:
    """Raise a PeftError for an id that a table of `size` rows lacks, unless `mask` is 0 there.

    Nothing is checked while ids or mask are traced, or where another process holds a part of them.
    """
    for array in (ids, mask):
        if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
            return
    ids = np.asarray(ids)
    wrong = (ids < 0) | (ids >= size)
    if mask is not None:
        wrong &= np.asarray(mask) != 0
    if wrong.any():
        remedy = remedy or "; use the model's own tokenizer, or load the model with vocab_size to add rows"
        raise PeftError(f"{name} has the id {ids[wrong][0]}; the model's table has {size} rows{remedy}")


def row_ids(
    batch: Batch, ids: Int[Array, ...], size: int, *, name: str = "input_ids", mask: str = "attention_mask"
) -> Int[Array, ...]:
    """The ids of a batch for a lookup in a table of `size` rows.

    A padding token that was added to a tokenizer alone has no row: where the mask is 0, such an id is read
    as row 0. Elsewhere the lookup gives NaN where it is traced, for a negative id too.

    Args:
        batch: with the mask, if there is one.
        ids: the ids.
        size: rows of the table.
        name: of the ids, for the error.
        mask: name of the mask in the batch, of the ids' shape.

    Raises:
        PeftError: for an id outside the table that is not masked, where the ids are not traced.
    """
    masked = batch.get(mask)
    remedy = "" if name.endswith("input_ids") else "; give ids below that"
    if masked is not None and jnp.shape(masked) != jnp.shape(ids):
        masked = None  # positions that all rows share
    require_ids(ids, size, masked, name=name, remedy=remedy)
    known = (ids >= 0) & (ids < size)
    return jnp.where(known, ids, size if masked is None else jnp.where(masked != 0, size, 0))
