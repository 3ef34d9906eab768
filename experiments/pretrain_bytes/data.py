"""Bytes of text files in rows of one length, and the small Llama that reads them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from peftjax.backbone.backbone import Backbone
from peftjax.core.errors import PeftError
from peftjax.losses import Batch
from peftjax.models import llama
from peftjax.models.decoder import decoder

BYTES = 256


@dataclasses.dataclass(frozen=True)
class Text:
    """What to train on, to choose the learning rate by, and to test on."""

    train: UInt8[np.ndarray, "T"]
    held_out: UInt8[np.ndarray, "H"]
    test: UInt8[np.ndarray, "H"]


def read_text(folder: Path, held_out: float = 0.05) -> Text:
    """The .txt files of a folder, end to end by name; the last two shares `held_out` are not trained on.

    Raises:
        PeftError: there are none.
    """
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise PeftError(f"{folder} has no .txt file to train on")
    whole = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    size = int(held_out * len(whole))
    return Text(whole[: -2 * size], whole[-2 * size : -size], whole[-size:])


def rows_of(text: UInt8[np.ndarray, "T"], length: int) -> UInt8[np.ndarray, "N L"]:
    """Rows of `length` bytes and the one that follows the last of them, which the next row begins with.

    Raises:
        PeftError: the text is too short for one.
    """
    count = (len(text) - 1) // length
    if count < 1:
        raise PeftError(f"a text of {len(text)} bytes has no row of {length} and one more")
    return np.lib.stride_tricks.sliding_window_view(text, length + 1)[: count * length : length]


def make_batch(rows: UInt8[np.ndarray, "B L"]) -> Batch:
    """Every byte of a row but the last, to be followed by the next one."""
    rows = rows.astype(np.int32)
    weights = np.ones((len(rows), rows.shape[1] - 1), np.float32)
    return {"input_ids": rows[:, :-1], "labels": rows[:, 1:], "weights": weights}


def training_batches(text: UInt8[np.ndarray, "T"], length: int, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches, every row once in an epoch, in the seed's order."""
    rows = rows_of(text, length)
    order = np.random.default_rng(seed)
    while True:
        for chosen in _whole_batches(order.permutation(len(rows)), size):
            yield make_batch(rows[chosen])


def first_batches(text: UInt8[np.ndarray, "T"], length: int, size: int, count: int) -> list[Batch]:
    """At most `count` batches spread evenly over a text, always the same."""
    rows = rows_of(text, length)
    chosen = np.linspace(0, len(rows) - 1, min(count * size, len(rows))).astype(int)
    return [make_batch(rows[part]) for part in _whole_batches(chosen, size)]


def _whole_batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    if len(rows) < size:
        raise PeftError(f"a text of {len(rows)} rows has no batch of {size}")
    yield from rows[: len(rows) // size * size].reshape(-1, size)


def small_llama(width: int, layers: int, length: int) -> Backbone:
    """A Llama over bytes with heads of 32 and an output layer of its own."""
    values = {
        "model_type": "llama",
        "vocab_size": BYTES,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
    }
    return decoder(llama.read_config(values), head="causal_lm")
