"""Vocabularies of another size than `config.json` says, and the rows of those that are made larger."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.backbone.backbone import Backbone
from peftjax.core.errors import PeftError
from peftjax.io.safetensors import Tensor
from peftjax.models.family import Family
from peftjax.models.shared import DECODER_TABLE, OUTPUT_LAYER, WORD_TABLE, names_in_file

VOCABULARY_AXES = {WORD_TABLE: 0, DECODER_TABLE: 0, OUTPUT_LAYER: 1, "head/bias": 0}
"""The axis of the vocabulary in the parameters that have one."""
LARGEST_VOCABULARY = 5_000_000
"""Words of a vocabulary at most: several times those of any checkpoint, and no memory is asked for more."""

logger = logging.getLogger(__name__)


def with_vocabulary_of(family: Family, config: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The configuration with as many words as the checkpoint's table has, which a resized model has changed.

    Args:
        family: the family.
        config: what `config.json` says.
        tensors: the checkpoint's, by their canonical names.
        folder: the checkpoint.
    """
    if not hasattr(config, "vocab_size"):
        return config
    model = family.build(config, head="none")
    word = next(weight.name for weight in family.table(model) if weight.path == WORD_TABLE)
    names = (word, *names_in_file(family, model).get(word, ()))
    table = next((tensors[name] for name in names if name in tensors), None)
    if table is None or len(table.shape) != 2 or table.shape[0] in (0, config.vocab_size):
        return config
    logger.warning(
        "%s: config.json has vocab_size %d, and %s has %d rows: the file's are used",
        folder,
        config.vocab_size,
        table.name,
        table.shape[0],
    )
    return dataclasses.replace(config, vocab_size=table.shape[0])


def require_vocabulary(size: Any) -> None:
    """Raise a PeftError unless `size` is that of a vocabulary."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_VOCABULARY:
        raise PeftError(f"vocab_size must be from 1 to {LARGEST_VOCABULARY:,}, not {size!r}")


def resized(path: str, leaf: np.ndarray, model: Backbone) -> np.ndarray:
    """A parameter with the vocabulary of a model: cut, or with rows that are the mean of those there are.

    The mean gives a new word no more probability than the words have by now, and needs no random numbers.
    """
    axis, size = VOCABULARY_AXES[path], model.config.vocab_size
    present = leaf.shape[axis]
    if size <= present:
        return np.take(leaf, range(size), axis=axis)
    mean = leaf.mean(axis=axis, keepdims=True, dtype=np.float32).astype(leaf.dtype)
    return np.concatenate([leaf, np.repeat(mean, size - present, axis=axis)], axis=axis)
