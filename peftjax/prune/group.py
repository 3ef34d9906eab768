"""What goes together when a model gets smaller: axes of several weights, unit by unit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

Kind = Literal["head", "neuron", "filter", "expert", "layer"]


@dataclass(frozen=True)
class Member:
    """One axis of one weight, on which every unit of a group has its numbers.

    Unit i has, for each r below `repeat`, the places `start + (r · count + i) · block` and the following
    ones up to `block` of them. What lies outside them stays.

    Attributes:
        path: of the weight.
        axis: of the whole array, stacked axes included.
        block: how many places in a row a unit has.
        start: the first place of unit 0.
        repeat: how often all the units come, one after the other.
        reads: whether activations of the units meet the weight here, as those of neurons do in the way down;
            else the weight makes them, or scales or shifts them.
    """

    path: str
    axis: int
    block: int = 1
    start: int = 0
    repeat: int = 1
    reads: bool = False

    def places(self, count: int) -> Int[np.ndarray, "repeat count block"]:
        """Where on the axis each of so many units lies."""
        return self.start + np.arange(self.repeat * count * self.block).reshape(
            self.repeat, count, self.block
        )


@dataclass(frozen=True)
class Group:
    """Units that are kept or removed, each with all its members at once.

    Attributes:
        kind: what a unit is.
        members: the axes on which it lies.
        count: how many units there are, in each place of `stack`.
        stack: sizes of the first axes that all members share, such as layers: the units of each of them are
            others. Empty where one choice holds for all.
    """

    kind: Kind
    members: tuple[Member, ...]
    count: int
    stack: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """That of scores and masks, `[*stack, count]`."""
        return (*self.stack, self.count)


Groups = Mapping[str, Group]
