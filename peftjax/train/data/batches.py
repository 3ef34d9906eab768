"""Tokenized examples as batches of few static shapes, by grain.

A batch is a dict of numpy arrays, `B` examples of `S` tokens:

- `input_ids` [B, S] int32, filled up with the pad id on the right,
- `attention_mask` [B, S] int32, 1 on tokens,
- `labels` [B] int32,
- `weights` [B] float32: 1 for an example, 0 for a row that only fills the last evaluation batch.

`S` is the smallest bucket length that holds the batch's longest example, so a program is compiled
at most once per bucket.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import grain
import numpy as np
from jaxtyping import Float, Int32, Int64

from peftjax.core.errors import PeftError
from peftjax.parallel.divided import divided
from peftjax.train.data.dataset import Split

Batch = dict[str, Int32[np.ndarray, "B ..."] | Float[np.ndarray, "B"]]
Encode = Callable[[Sequence[str], int], list[list[int]]]

SHORTEST_BUCKET = 16
WINDOW = 16
"""Batches per shuffle window: only within a window are examples grouped by length."""


@dataclass(frozen=True)
class TokenizedSplit:
    """Examples as token ids, end to end: example i is `ids[starts[i]:starts[i + 1]]`."""

    ids: Int32[np.ndarray, "T"]
    starts: Int64[np.ndarray, "N+1"]
    labels: Int32[np.ndarray, "N"]
    max_length: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Int64[np.ndarray, "N"]:
        """Tokens per example."""
        return np.diff(self.starts)


def sample(split: TokenizedSplit, count: int, seed: int) -> TokenizedSplit:
    """`count` examples drawn without replacement, in their order; all where there are not more."""
    if len(split) <= count:
        return split
    rows = np.sort(np.random.default_rng(seed).choice(len(split), count, replace=False))
    pieces = [split.ids[split.starts[row] : split.starts[row + 1]] for row in rows]
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    return replace(split, ids=np.concatenate(pieces), starts=starts, labels=split.labels[rows])


def tokenize(split: Split, encode: Encode, *, max_length: int, pad_id: int) -> TokenizedSplit:
    """All texts of a split as token ids; `encode(texts, max_length)` truncates.

    Of several processes each encodes a part of the texts.

    Raises:
        PeftError: an example without tokens or with more than `max_length`.
    """
    encoded = divided(
        split.texts, lambda texts: [np.array(ids, np.int32) for ids in encode(texts, max_length)]
    )
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    for i in np.flatnonzero((lengths == 0) | (lengths > max_length))[:1]:
        raise PeftError(
            f"the tokenizer gave {lengths[i]} tokens for example {i} ({split.texts[i][:40]!r}); "
            f"1 to max_length={max_length} are needed"
        )
    return TokenizedSplit(
        ids=np.concatenate([*encoded, np.zeros(0, np.int32)]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.array(split.labels, np.int32),
        max_length=max_length,
        pad_id=pad_id,
    )


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """The static sequence lengths: powers of two from `SHORTEST_BUCKET`, and `max_length` itself.

    >>> bucket_lengths(100)
    (16, 32, 64, 100)
    """
    lengths = [SHORTEST_BUCKET]
    while lengths[-1] < max_length:
        lengths.append(2 * lengths[-1])
    return (*(length for length in lengths if length < max_length), max_length)


def bucket_of(length: int, max_length: int) -> int:
    """The smallest of `bucket_lengths(max_length)` that holds `length` tokens."""
    return next(bucket for bucket in bucket_lengths(max_length) if bucket >= length)


def make_batch(split: TokenizedSplit, rows: Sequence[int], size: int) -> Batch:
    """The batch of the examples `rows`, filled up to `size` rows of weight 0."""
    length = bucket_of(max(split.starts[i + 1] - split.starts[i] for i in rows), split.max_length)
    batch = {
        "input_ids": np.full((size, length), split.pad_id, np.int32),
        "attention_mask": np.zeros((size, length), np.int32),
        "labels": np.zeros(size, np.int32),
        "weights": np.zeros(size, np.float32),
    }
    # A row without any token has no softmax; the padding may be one that the model lacks.
    batch["attention_mask"][len(rows) :, 0] = 1
    batch["input_ids"][len(rows) :, 0] = split.ids[split.starts[rows[0]]]
    for row, i in enumerate(rows):
        ids = split.ids[split.starts[i] : split.starts[i + 1]]
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row] = split.labels[i]
        batch["weights"][row] = 1.0
    return batch


@dataclass(frozen=True)
class _SplitWindow(grain.experimental.FlatMapTransform):
    """A window's batches one after the other."""

    max_fan_out: int

    def flat_map(self, element: list[list[int]]) -> list[list[int]]:
        """The batches of a window."""
        return element


def training_batches(split: TokenizedSplit, batch_size: int, seed: int) -> grain.DatasetIterator:
    """An endless iterator over training batches, the same for the same seed; see `shuffled_batches`."""
    return shuffled_batches(
        split.lengths, batch_size, seed, lambda rows: make_batch(split, rows, batch_size), window=WINDOW
    )


def shuffled_batches(
    lengths: Int64[np.ndarray, "N"],
    batch_size: int,
    seed: int,
    make: Callable[[list[int]], Batch],
    *,
    window: int,
) -> grain.DatasetIterator:
    """An endless iterator over `make(examples)`, the same for the same seed.

    Every epoch visits every example once in a new order. Of each `window` consecutive batches the
    examples are sorted by length, cut into batches, and the batches shuffled, so a batch has
    examples of similar length and little padding. `get_state()` is a JSON-able dict;
    `set_state()` with it continues with exactly the next batch.
    """
    window = max(1, min(window, len(lengths) // batch_size))
    size = window * batch_size

    def group(rows: list[int], generator: np.random.Generator) -> list[list[int]]:
        ordered = sorted(rows, key=lambda i: (lengths[i], i))
        order = generator.permutation(window)
        return [ordered[k * batch_size : (k + 1) * batch_size] for k in order]

    order = grain.MapDataset.source(range(len(lengths))).seed(seed).shuffle().repeat()
    # grain cannot count the endless batches of a single element.
    windows = order.batch(size, batch_fn=list) if size > 1 else order.map(lambda row: [row])
    grouped = windows.random_map(group).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    rows = grain.experimental.FlatMapIterDataset(grouped, _SplitWindow(max_fan_out=window))
    return iter(rows.map(make))


def evaluation_batches(split: TokenizedSplit, batch_size: int) -> Iterator[Batch]:
    """Every example once, the shortest first; the last batch is filled up with rows of weight 0."""
    for rows in shortest_first(split.lengths, batch_size):
        yield make_batch(split, rows, batch_size)


def shortest_first(lengths: Int64[np.ndarray, "N"], batch_size: int) -> Iterator[Int64[np.ndarray, "B"]]:
    """The examples of each evaluation batch; the last may have fewer than `batch_size`."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(lengths), batch_size):
        yield order[start : start + batch_size]
