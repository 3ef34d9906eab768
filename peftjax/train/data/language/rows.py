"""Tokens as the rows that batches are made of: an example a row, packed rows, or blocks of running text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64

from peftjax.train.data.batches import bucket_lengths
from peftjax.train.data.language.example import Example
from peftjax.train.data.language.packing import best_fit_decreasing

Layout = Literal["bucketed", "packed", "blocks"]
"""`bucketed`: an example a row, a batch as long as its longest example needs. `packed`: several
segments in a row of `max_length`. `blocks`: one segment in a row of `max_length`."""


@dataclass(frozen=True)
class TokenRows:
    """Tokens end to end, and which of them form a row.

    Segment m is `ids[segments[m, 0]:segments[m, 1]]`; row r has the segments
    `starts[r]` to `starts[r + 1]`. The label of a token is the next one.
    """

    ids: Int32[np.ndarray, "T"]
    counts: Bool[np.ndarray, "T"]
    """Whether the label of the token (`ids` one further) counts."""
    segments: Int64[np.ndarray, "M 2"]
    starts: Int64[np.ndarray, "R+1"]
    layout: Layout
    max_length: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, "R"]:
        """Real tokens per row."""
        ends = np.append(0, np.cumsum(self.segments[:, 1] - self.segments[:, 0]))
        return np.diff(ends[self.starts])

    @property
    def tokens(self) -> int:
        """Real tokens in all rows."""
        return int(self.lengths.sum())

    @property
    def counted_tokens(self) -> int:
        """Labels that count, in all rows."""
        return int(self.counts.sum())

    @property
    def efficiency(self) -> float:
        """Real tokens per slot; of bucketed rows, where every row has the bucket that it needs itself."""
        if self.layout != "bucketed":
            return self.tokens / (len(self) * self.max_length)
        buckets = np.array(bucket_lengths(self.max_length))
        return self.tokens / int(buckets[np.searchsorted(buckets, self.lengths)].sum())


def example_rows(
    examples: Sequence[Example], *, max_length: int, pad_id: int, packed: bool, train_on_prompt: bool = False
) -> TokenRows:
    """An example a row, or packed into rows of `max_length`.

    The label of a token counts where the next token is the model's own, or everywhere
    (`train_on_prompt`); that of an example's last token never does.

    Args:
        examples: of at most `max_length` tokens each.
        max_length: the longest row.
        pad_id: fills the rows up.
        packed: whether examples share rows.
        train_on_prompt: whether the tokens of the prompt count too.
    """
    lengths = np.array([len(example) for example in examples], np.int64)
    ends = np.cumsum(lengths)
    spans = np.stack([ends - lengths, ends], axis=1)
    own = np.concatenate([example.own for example in examples])
    counts = np.append(np.ones(len(own) - 1, bool) if train_on_prompt else own[1:], False)
    counts[ends - 1] = False
    if packed:
        rows = best_fit_decreasing(lengths.tolist(), max_length)
    else:
        rows = [[i] for i in range(len(examples))]
    return TokenRows(
        ids=np.concatenate([example.ids for example in examples]),
        counts=counts,
        segments=spans[[item for row in rows for item in row]],
        starts=np.append(0, np.cumsum([len(row) for row in rows])),
        layout="packed" if packed else "bucketed",
        max_length=max_length,
        pad_id=pad_id,
    )


def corpus_rows(
    documents: Sequence[Example], *, max_length: int, pad_id: int, attend_across_documents: bool = True
) -> TokenRows:
    """The stream of all documents, cut into blocks of `max_length` tokens and one more for the last label.

    The last token of a block is the first of the next, so every token but the stream's first is a
    label once. The last block may be shorter. Without `attend_across_documents` each document
    is a segment of its own in a block, and the token after its end is no label.
    """
    ids = np.concatenate([document.ids for document in documents])
    ends = np.cumsum([len(document) for document in documents])
    blocks = np.arange(0, len(ids) - 1, max_length)
    counts = np.ones(len(ids), bool)
    counts[-1] = False
    cuts = blocks
    if not attend_across_documents:
        counts[ends - 1] = False
        cuts = np.union1d(blocks, ends[:-1])
        cuts = cuts[cuts < len(ids) - 1]
    return TokenRows(
        ids=ids,
        counts=counts,
        segments=np.stack([cuts, np.append(cuts[1:], len(ids) - 1)], axis=1),
        starts=np.append(np.searchsorted(cuts, blocks), len(cuts)),
        layout="blocks" if attend_across_documents else "packed",
        max_length=max_length,
        pad_id=pad_id,
    )
