"""Batches of a language model, by grain.

A batch is a dict of numpy arrays [B, S]:

- `input_ids` int32, filled up with the pad id on the right,
- `attention_mask` int32, 1 on tokens,
- `labels` int32: the token after each token, 0 where it does not count,
- `weights` float32: 1 where the label counts, else 0,
- `position_ids` int32, from 0 on in each segment, 0 on padding,
- `segment_ids` int32, in packed batches only: from 1 on in each row, 0 on padding; a token attends
  to tokens of its own segment only.

`S` is `max_length` in packed rows and blocks, so that one program is compiled; else the smallest
bucket length that holds the batch's longest example.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from peftjax.train.data.batches import WINDOW, Batch, bucket_of, shortest_first, shuffled_batches
from peftjax.train.data.language.rows import TokenRows


def make_batch(rows: TokenRows, chosen: Sequence[int], size: int) -> Batch:
    """The batch of the rows `chosen`, filled up to `size` rows of weight 0."""
    length = rows.max_length
    if rows.layout == "bucketed":
        first, last = (rows.segments[rows.starts[np.asarray(chosen) + end] - end] for end in (0, 1))
        length = bucket_of((last[:, 1] - first[:, 0]).max(), rows.max_length)
    names = ["input_ids", "attention_mask", "labels", "weights", "position_ids"]
    if rows.layout == "packed":
        names.append("segment_ids")
    batch = {name: np.zeros((size, length), np.int32) for name in names}
    batch["weights"] = batch["weights"].astype(np.float32)
    batch["input_ids"][:] = rows.pad_id
    # A row without any token has no softmax; the padding may be one that the model lacks.
    for name in {"attention_mask", "segment_ids"} & set(names):
        batch[name][len(chosen) :, 0] = 1
    batch["input_ids"][len(chosen) :, 0] = rows.ids[0]
    for k, row in enumerate(chosen):
        at = 0
        for number, (start, stop) in enumerate(rows.segments[rows.starts[row] : rows.starts[row + 1]], 1):
            counts = rows.counts[start:stop]
            slots = (k, slice(at, at + stop - start))
            batch["input_ids"][slots] = rows.ids[start:stop]
            batch["attention_mask"][slots] = 1
            batch["labels"][slots][counts] = rows.ids[np.flatnonzero(counts) + start + 1]
            batch["weights"][slots] = counts
            batch["position_ids"][slots] = np.arange(stop - start)
            if rows.layout == "packed":
                batch["segment_ids"][slots] = number
            at += stop - start
    return batch


def training_batches(rows: TokenRows, batch_size: int, seed: int) -> grain.DatasetIterator:
    """An endless iterator over training batches, the same for the same seed.

    See `peftjax.train.data.batches.shuffled_batches` for the order and for the exact resume; rows of
    one length are not grouped.
    """
    return shuffled_batches(
        rows.lengths,
        batch_size,
        seed,
        lambda chosen: make_batch(rows, chosen, batch_size),
        window=WINDOW if rows.layout == "bucketed" else 1,
    )


def evaluation_batches(rows: TokenRows, batch_size: int) -> Iterator[Batch]:
    """Every row once, the shortest first; the last batch is filled up with rows of weight 0."""
    for chosen in shortest_first(rows.lengths, batch_size):
        yield make_batch(rows, chosen, batch_size)
