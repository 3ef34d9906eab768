"""Rows of a fixed length with as little padding as there can be: several examples, or running text."""

import bisect
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row of `capacity`: the longest first, each where it leaves the least space.

    Of rows with equal space the newest is taken, and of equal lengths the first in order goes
    first, so the same lengths always give the same rows. O(n log n) for a given capacity.

    >>> best_fit_decreasing([3, 5, 2, 4, 1], 6)
    [[1, 4], [3, 2], [0]]
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # The keys of `with_space` in order.
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(spaces, lengths[item])
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        rows[row].append(item)
        if left := space - lengths[item]:
            if left not in with_space:
                with_space[left] = []
                bisect.insort(spaces, left)
            with_space[left].append(row)
    return rows
