"""Work on many items that several processes divide: each does its part, and all have the result of all."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int32

from peftjax.core.errors import PeftError

T = TypeVar("T")
Numbers = Int32[np.ndarray, "_"]

AT_ONCE = 2**24
"""Numbers that pass between processes at a time, those of all together: each device holds them meanwhile."""


def divided(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[Numbers]]) -> list[Numbers]:
    """What `work` makes of each item, in the order of the items; all processes have to ask.

    Args:
        items: those that all processes have alike.
        work: an int32 array of any length for each of the items that it is given.

    Raises:
        PeftError: that of the first process whose work raises one, in all of them.
    """
    if jax.process_count() == 1:
        return list(work(items))
    first, end = (len(items) * (jax.process_index() + k) // jax.process_count() for k in (0, 1))
    found: list[Numbers] = []
    refusal = ""
    try:
        found = list(work(items[first:end])) if end > first else []
    except PeftError as error:
        refusal = str(error)
    _raise_first(refusal)
    lengths = np.concatenate(exchanged(np.array([len(one) for one in found], np.int32)))
    numbers = np.concatenate(exchanged(np.concatenate([*found, np.zeros(0, np.int32)])))
    return np.split(numbers, np.cumsum(lengths)[:-1])[: len(items)]


def exchanged(own: Numbers) -> list[Numbers]:
    """The array of each process, each of its own length; all have to ask."""
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    # Few shapes: each is a program of its own.
    length = min(2 ** int(max(sizes) - 1).bit_length() if max(sizes) else 0, AT_ONCE // len(sizes))
    parts: list[list[Numbers]] = [[] for _ in sizes]
    for start in range(0, int(max(sizes)), max(length, 1)):
        piece = np.zeros(length, np.int32)
        mine = own[start : start + length]
        piece[: len(mine)] = mine
        for part, size, got in zip(parts, sizes, multihost_utils.process_allgather(piece)):
            part.append(got[: max(int(size) - start, 0)])
    return [np.concatenate([*part, np.zeros(0, np.int32)]) for part in parts]


def _raise_first(refusal: str) -> None:
    """Raise the first refusal of all processes, if there is one: none goes on while another cannot."""
    for letters in exchanged(np.array([ord(letter) for letter in refusal], np.int32)):
        if len(letters):
            raise PeftError("".join(map(chr, letters)))
