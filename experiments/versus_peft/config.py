"""What both sides of the race train: one checkpoint, one batch a step, the same settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import peftjax as pj
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config

LLAMA_31M = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""31.6 million parameters."""


@dataclasses.dataclass(frozen=True)
class Racer:
    """A contender of the race: one way of training.

    Attributes:
        library: "peftjax" or "peft" (PyTorch).
        method: "lora" (rank 16, alpha 32, all linear layers but the output) or "full".
        checkpointing: whether each layer is recomputed in the backward pass.
    """

    library: str
    method: str
    checkpointing: bool

    @property
    def name(self) -> str:
        """A name for tables."""
        return f"{self.library} {self.method}{' + checkpointing' if self.checkpointing else ''}"


@dataclasses.dataclass(frozen=True)
class Race:
    """What is trained.

    Attributes:
        batch: rows of a batch.
        length: tokens of a row.
        rank: of the LoRA factors; alpha is twice that.
        learning_rate: of AdamW without weight decay.
    """

    batch: int = 8
    length: int = 256
    rank: int = 16
    learning_rate: float = 1e-4


def write_checkpoint(folder: Path, values: dict[str, Any] = LLAMA_31M) -> None:
    """A random checkpoint in Hugging Face's format, from one seed."""
    model = decoder(read_config(values))
    pj.save(folder, model, model.init(jax.random.key(0)))


def tokens(race: Race, step: int, vocabulary: int = LLAMA_31M["vocab_size"]) -> np.ndarray:
    """The tokens [B, S + 1] of one step, the same on both sides."""
    return np.random.default_rng(step).integers(0, vocabulary, (race.batch, race.length + 1), np.int32)
