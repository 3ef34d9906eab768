"""Axes of the arrays of a program that have to be cut alike: a union of parts that may still be split."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Scope = tuple[int, ...]
"""The loops around an equation, by number, from the outermost in."""
Axis = tuple[int, ...]
"""An axis as the parts that it is made of, the slowest first; an axis of size 1 has none."""


@dataclass
class Dimensions:
    """The parts, by number. Those that are joined are one; one that is split is the product of others.

    Attributes:
        sizes: of each part.
        fixed: the parts that cannot be cut, those that are joined to one included when they are asked.
    """

    sizes: list[int] = field(default_factory=list)
    fixed: set[int] = field(default_factory=set)
    parents: list[int] = field(default_factory=list)
    pieces: dict[int, tuple[int, int]] = field(default_factory=dict)
    touched: dict[int, set[Scope]] = field(default_factory=dict)

    def axis(self, size: int, *, fixed: bool = False) -> Axis:
        """A new axis."""
        if size == 1:
            return ()
        part = self._new(size)
        if fixed:
            self.fixed.add(part)
        return (part,)

    def parts(self, axis: Axis) -> list[int]:
        """The parts of an axis that are not split, each by the number of all that are joined to it."""
        found: list[int] = []
        for part in axis:
            root = self._root(part)
            found += self.parts(self.pieces[root]) if root in self.pieces else [root]
        return found

    def fix(self, axis: Axis) -> None:
        """Let nothing be cut here."""
        self.fixed.update(self.parts(axis))

    def touch(self, axis: Axis, scope: Scope) -> None:
        """Note where an activation has the axis."""
        for part in self.parts(axis):
            self.touched.setdefault(part, set()).add(scope)

    def join(self, one: Axis, other: Axis) -> None:
        """Make two axes of one size the same; where their parts do not fit into each other, fix both."""
        left, right = self.parts(one), self.parts(other)
        while left and right:
            a, b = left.pop(0), right.pop(0)
            small, large = min(self.sizes[a], self.sizes[b]), max(self.sizes[a], self.sizes[b])
            if large % small:
                for part in (a, b, *left, *right):
                    self.fixed.add(part)
                return
            if small == large:
                self._union(a, b)
            elif self.sizes[a] > small:
                first, rest = self._split(a, small)
                self._union(first, b)
                left.insert(0, rest)
            else:
                first, rest = self._split(b, small)
                self._union(a, first)
                right.insert(0, rest)

    def reshaped(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis] | None:
        """The axes of a reshape's result; None where one ends inside of a part that cannot be split."""
        rest = [part for axis in axes for part in self.parts(axis)]
        found: list[Axis] = []
        for size in sizes:
            own: list[int] = []
            while size > 1:
                part = rest.pop(0)
                have = self.sizes[part]
                if have > size and have % size == 0:
                    part, after = self._split(part, size)
                    rest.insert(0, after)
                elif size % have:
                    return None
                own.append(part)
                size //= self.sizes[part]
            found.append(tuple(own))
        return found

    def scopes(self, part: int) -> set[Scope]:
        """Where activations have a part."""
        return self.touched.get(part, set())

    def _new(self, size: int) -> int:
        self.sizes.append(size)
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def _root(self, part: int) -> int:
        while self.parents[part] != part:
            part = self.parents[part]
        return part

    def _split(self, part: int, first: int) -> tuple[int, int]:
        """A part, not split yet, as `first` times another, the first the slower."""
        pieces = self._new(first), self._new(self.sizes[part] // first)
        self.pieces[part] = pieces
        for piece in pieces:
            if part in self.fixed:
                self.fixed.add(piece)
            if part in self.touched:
                self.touched[piece] = set(self.touched[part])
        return pieces

    def _union(self, one: int, other: int) -> None:
        if one == other:
            return
        self.parents[other] = one
        if other in self.fixed:
            self.fixed.add(one)
        if other in self.touched:
            self.touched.setdefault(one, set()).update(self.touched.pop(other))


def common_prefix(scopes: Iterable[Scope]) -> Scope:
    """The loops that are around all of them."""
    found = list(scopes)
    prefix: list[int] = []
    for numbers in zip(*found):
        if len(set(numbers)) > 1:
            break
        prefix.append(numbers[0])
    return tuple(prefix)
