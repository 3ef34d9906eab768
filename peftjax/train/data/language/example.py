"""A tokenised example of a language model, and texts in pieces whose seams no token crosses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from peftjax.models.tokenizer import Tokenizer


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


def encode_pieces(tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The ids of each piece of each text, as the model meets them when it writes on after a piece.

    A piece is tokenised together with what stands before it, because a tokenizer may treat the start
    of a text in its own way (a leading space, for example). Where that would change the ids of what
    stands before it (a token across the seam), the piece is tokenised alone instead.
    """
    found: list[list[list[int]]] = [[] for _ in texts]
    before = ["" for _ in texts]
    before_ids: list[list[int]] = [[] for _ in texts]
    for k in range(max(map(len, texts), default=0)):
        alive = [i for i, pieces in enumerate(texts) if k < len(pieces)]
        longer = tokenizer.token_ids([before[i] + texts[i][k] for i in alive])
        crossed = [i for i, ids in zip(alive, longer) if ids[: len(before_ids[i])] != before_ids[i]]
        alone = dict(zip(crossed, tokenizer.token_ids([texts[i][k] for i in crossed])))
        for i, ids in zip(alive, longer):
            if i in alone:
                found[i].append(alone[i])
                before[i], before_ids[i] = texts[i][k], alone[i]
            else:
                found[i].append(ids[len(before_ids[i]) :])
                before[i], before_ids[i] = before[i] + texts[i][k], ids
    return found
