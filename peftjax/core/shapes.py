"""Which axes of two shapes of one array go together."""

import math
from itertools import accumulate


def match_sizes(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Group positions of `old` with sizes of `new` so that the products of each group are equal.

    Unit axes of `new` that no unit axis of `old` answers to form groups of their own.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and old[i] == new[j]:
            groups.append(([i], [new[j]]))
            i, j = i + 1, j + 1
            continue
        if j < len(new) and new[j] == 1:
            groups.append(([], [1]))
            j += 1
            continue
        if i < len(old) and old[i] == 1:
            groups.append(([i], []))
            i += 1
            continue
        if i == len(old) or j == len(new):
            return None
        left, right, have, want = [i], [new[j]], old[i], new[j]
        i, j = i + 1, j + 1
        while have != want:
            if have < want and i < len(old):
                left.append(i)
                have *= old[i]
                i += 1
            elif want < have and j < len(new):
                right.append(new[j])
                want *= new[j]
                j += 1
            else:
                return None
        groups.append((left, right))
    return groups


def refined(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The coarsest shape that both shapes merge, and how many of its axes each of `new` is made of.

    None where they have none, or an axis is empty. Unit axes of `old` are kept.
    """
    groups = match_sizes(old, new) if math.prod(old) else None
    if groups is None:
        return None
    fine: list[int] = []
    counts: list[int] = []
    loose = 0  # unit axes of the old shape that go with the next axis of the new one
    for positions, sizes in groups:
        if not sizes:
            fine += [1] * len(positions)
            loose += len(positions)
            continue
        ends = list(accumulate(sizes, lambda size, following: size * following))
        found = [0] * len(sizes)
        done = 1
        for position in positions:
            end = done * old[position]
            cuts = sorted({e for e in ends if done < e < end} | {end})
            for cut in cuts:
                if cut % done:
                    return None
                fine.append(cut // done)
                found[next(n for n, e in enumerate(ends) if e >= cut)] += 1
                done = cut
        found[0] += loose
        counts, loose = [*counts, *found], 0
    if loose and counts:
        counts[-1] += loose
    return (tuple(fine), tuple(counts)) if counts else None
