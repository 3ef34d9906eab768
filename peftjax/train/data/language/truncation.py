"""Examples cut to a greatest length: the completion stays, the prompt loses its left end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftjax.train.data.language.example import Example


@dataclass(frozen=True)
class Cut:
    """What did not fit."""

    shortened: int = 0
    """Examples whose prompt lost its left end."""
    tokens: int = 0
    """Tokens that those lost."""
    turns: int = 0
    """Earlier turns of chats that lost tokens, and so do not count any more."""
    too_long: int = 0
    """Examples left out because their last completion does not fit."""
    empty: int = 0
    """Examples left out because there is nothing in them to learn."""

    def __str__(self) -> str:
        parts = (
            (self.shortened, f"{self.shortened} prompts cut by {self.tokens} tokens in all"),
            (self.turns, f"{self.turns} earlier turns cut"),
            (self.too_long, f"{self.too_long} examples left out as too long"),
            (self.empty, f"{self.empty} left out with nothing to learn"),
        )
        return ", ".join(text for count, text in parts if count) or "nothing cut"


def truncate(
    examples: Sequence[Example], max_length: int, *, prefix: Sequence[int] = (), train_on_prompt: bool = False
) -> tuple[list[Example], Cut]:
    """The examples in at most `max_length` tokens, and what that took.

    What goes is the left end, behind a leading `prefix` (bos), up to the last completion at most,
    which needs at least one token before it. Of an earlier turn that loses tokens the rest is
    context and does not count. An example without any completion has nothing to learn, unless
    the prompt counts (`train_on_prompt`).
    """
    kept = []
    shortened = tokens = turns = too_long = empty = 0
    for example in examples:
        if len(example) < 2 or not (train_on_prompt or example.own[1:].any()):
            empty += 1
            continue
        if len(example) > max_length and not train_on_prompt:
            example = _without_tail(example)
        excess = len(example) - max_length
        if excess <= 0:
            kept.append(example)
            continue
        head = len(prefix) if example.ids[: len(prefix)].tolist() == list(prefix) else 0
        if _last_turn(example) - excess < max(head, 1):
            too_long += 1
            continue
        shorter, lost = _cut(example, head, excess)
        kept.append(shorter)
        shortened, tokens, turns = shortened + 1, tokens + excess, turns + lost
    return kept, Cut(shortened, tokens, turns, too_long, empty)


def _without_tail(example: Example) -> Example:
    """Without what follows the last completion: no counted token sees it."""
    end = np.flatnonzero(example.own)[-1] + 1
    return Example(example.ids[:end], example.own[:end])


def _turn_starts(example: Example) -> np.ndarray:
    return np.flatnonzero(example.own & ~np.append(False, example.own[:-1]))


def _last_turn(example: Example) -> int:
    """Where the last completion begins; the end where there is none."""
    starts = _turn_starts(example)
    return int(starts[-1]) if len(starts) else len(example)


def _cut(example: Example, head: int, excess: int) -> tuple[Example, int]:
    """The example without the `excess` tokens from `head` on, and how many turns lost tokens."""
    stop = head + excess
    lost = int(np.sum(_turn_starts(example) < stop))
    own = example.own.copy()
    if own[stop - 1]:  # The rest of a turn that was cut in two is context.
        stays = np.flatnonzero(~own[stop:])
        own[stop : stop + (stays[0] if len(stays) else 0)] = False
    keep = np.r_[:head, stop : len(example)]
    return Example(example.ids[keep], own[keep]), lost
