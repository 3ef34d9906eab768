"""A tokenized example of a language model, and texts in pieces whose seams no token crosses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int32

from peftjax.parallel.divided import divided
from peftjax.text.tokenizer import Tokenizer

T = TypeVar("T")

_ANCHORS = ("", *"xqz1.,;:)]>|\n ae")
"""What a piece can be tokenized behind: nothing, or a letter that it does not form a token with."""


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them the model is to learn to write."""

    ids: Int32[np.ndarray, "T"]
    own: Bool[np.ndarray, "T"]
    """True on the tokens of the completion or the assistant, False on those of the prompt."""

    def __len__(self) -> int:
        return len(self.ids)


def make_example(runs: Sequence[tuple[Sequence[int], bool]]) -> Example:
    """The example of runs of ids, each with whether it is the model's own."""
    ids = [id for run, _ in runs for id in run]
    own = [is_own for run, is_own in runs for _ in run]
    return Example(np.array(ids, np.int32), np.array(own, bool))


def divided_examples(
    items: Sequence[T], tokenize: Callable[[Sequence[T]], Sequence[Example]]
) -> list[Example]:
    """The example of each item, of which each of several processes tokenizes a part; see `divided`."""

    def numbers(part: Sequence[T]) -> list[np.ndarray]:
        return [2 * example.ids + example.own for example in tokenize(part)]  # both in one int32

    return [Example(both >> 1, (both & 1).astype(bool)) for both in divided(items, numbers)]


def encode_pieces(tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The ids of each piece of each text, as the model meets them when it writes on after a piece.

    A piece is tokenized together with what stands before it, because a tokenizer may treat the start
    of a text in its own way (a leading space, for example). Where that would change the ids of what
    stands before it (a token across the seam), the piece is tokenized without that: alone, or behind
    another letter, whichever spells the same text.
    """
    found: list[list[list[int]]] = [[] for _ in texts]
    before = ["" for _ in texts]
    before_ids: list[list[int]] = [[] for _ in texts]
    for k in range(max(map(len, texts), default=0)):
        alive = [i for i, pieces in enumerate(texts) if k < len(pieces)]
        longer = tokenizer.token_ids([before[i] + texts[i][k] for i in alive])
        for i, ids in zip(alive, longer):
            anchor, head, own = before[i], before_ids[i], ids[len(before_ids[i]) :]
            if ids[: len(head)] != head:
                anchor, head, own = _behind_a_seam(tokenizer, head, texts[i][k], ids)
            found[i].append(own)
            before[i], before_ids[i] = anchor + texts[i][k], [*head, *own]
    return found


def _behind_a_seam(
    tokenizer: Tokenizer, before: Sequence[int], piece: str, whole: Sequence[int]
) -> tuple[str, list[int], list[int]]:
    """The ids of a piece that spell it after `before`, and the letter with its ids that they stand behind.

    A tokenizer that puts a space in front of a text would put one between two pieces, so the piece is
    put behind a letter that no token joins it with. Where nothing spells `whole`, it is taken alone.
    """
    spelt = tokenizer.decode(whole, skip_special_tokens=False)
    for anchor in _ANCHORS:
        head, both = tokenizer.token_ids([anchor, anchor + piece])
        own = both[len(head) :]
        joined = [*before, *own]
        if both[: len(head)] == head and tokenizer.decode(joined, skip_special_tokens=False) == spelt:
            return anchor, head, own
    return "", [], tokenizer.token_ids([piece])[0]
