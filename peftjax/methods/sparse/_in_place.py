"""What the methods that exchange a part of each weight share: their plan and the in-place form.

In place, the base holds the adapted weights: its memory is that of the base plus the trained values.
`original` (frozen) keeps what lay at the trained places, so that going back is exact.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.tree import Targets
from peftjax.transform.transform import Frozen, Trainable
from peftjax.weights.base import Weight
from peftjax.weights.layout import Layout, layout_of

Slots = Mapping[str, Array]


@dataclass(frozen=True)
class Place:
    """A weight of which a part is trained: static facts, known before training."""

    path: str
    layout: Layout
    count: int
    """How many rows, or entries, of each matrix of the stack."""
    scale: float = 1.0


@dataclass(frozen=True)
class Plan:
    """All the weights, and whether they hold the trained values."""

    places: tuple[Place, ...]
    written: bool = False


Put = Callable[[Array, Place, Slots, Slots | None], Array]
"""`(array, place, frozen slots, trained slots) -> array` with the trained values, for None the original."""


def find_weights(
    params: Any,
    *,
    who: str,
    targets: Targets,
    exclude: Targets | None,
    layouts: Mapping[str, str] | None,
    in_place: bool,
    one_way: bool = False,
) -> dict[str, Layout]:
    """The layout of every weight that the options ask for, by path; `one_way` as in `layout_of`.

    Raises:
        PeftError: nothing, or only part of a list, is matched; or a weight to be changed in place is
            not an array.
    """
    leaves = tree.named_leaves(params)
    paths = tree.select(params, targets, who=who, exclude=exclude)
    tree.require_patterns_used(who, layouts, paths)
    for path in paths:
        if in_place and isinstance(leaves[path], Weight):
            raise PeftError(
                f"{who}: {path!r} is a {type(leaves[path]).__name__}, which cannot be changed in place; "
                "set in_place=False"
            )
    return {path: layout_of(path, leaves, layouts, one_way=one_way) for path in paths}


def writer(put: Put) -> Callable[[Frozen, Trainable | None], Frozen]:
    """The `write` hook of a method, from what puts its values into one array."""

    def write(frozen: Frozen, trainable: Trainable | None) -> Frozen:
        if trainable is None and not frozen.plan.written:
            return frozen
        leaves = tree.named_leaves(frozen.params)
        written = {}
        for place in frozen.plan.places:
            slots = None if trainable is None else trainable[place.path]
            written[place.path] = put(leaves[place.path], place, frozen.state[place.path], slots)
        plan = replace(frozen.plan, written=trainable is not None)
        return Frozen(tree.replace(frozen.params, written), frozen.state, plan)

    return write
