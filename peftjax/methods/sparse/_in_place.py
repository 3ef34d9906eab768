"""What the methods that train a part of each weight share: their plan and the in-place form.

In place, the base holds the adapted weights when it is closed: its memory is that of the base plus the
trained values. `original`, in `frozen.state`, keeps the base's values at the trained places, so that
opening is exact.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, require_experts_named, require_patterns_used, select
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.transform import Placement
from peftjax.weights.base import Weight
from peftjax.weights.layout import Layout, layout_of

Slots = Mapping[str, Array]


@dataclass(frozen=True)
class Place:
    """A weight of which a part is trained: the static facts, known before training."""

    path: str
    layout: Layout
    count: int
    """How many rows, or entries, of each matrix of the stack."""
    scale: float = 1.0


@dataclass(frozen=True)
class Plan:
    """All the weights, and whether the base holds the trained values."""

    places: tuple[Place, ...]
    closed: bool = False


Put = Callable[[Array, Place, Slots, Slots | None], Array]
"""`(array, place, frozen slots, trained slots) -> array` with the trained values, for None the original."""


def find_weights(
    params: Any,
    *,
    caller: str,
    targets: Targets,
    exclude: Targets | None,
    layouts: Mapping[str, str] | None,
    in_place: bool,
    one_way: bool = False,
) -> dict[str, Layout]:
    """The layout of every weight that the options ask for, by path.

    Args:
        params: the parameters.
        caller: the method's name, for the errors.
        targets: as in `lora`.
        exclude: as in `lora`.
        layouts: as in `lora`.
        in_place: whether the weights are to be changed in place.
        one_way: whether it matters which side of a weight is the input, as in `layout_of`.

    Raises:
        PeftError: nothing, or only part of a list, is matched; 'all-linear' meets experts; or a weight to
            be changed in place is not an array.
    """
    leaves = tree.named_leaves(params)
    paths = select(params, targets, caller=caller, exclude=exclude)
    require_experts_named(caller, targets, paths)
    require_patterns_used(caller, layouts, paths)
    for path in paths:
        if in_place and isinstance(leaves[path], Weight):
            raise PeftError(
                f"{caller}: {path!r} is a {type(leaves[path]).__name__}, which cannot be changed in place; "
                "set in_place=False"
            )
    return {path: layout_of(path, leaves, layouts, one_way=one_way) for path in paths}


def in_the_base(put: Put) -> Placement:
    """The placement of a method in place, from the function that puts its values into one array."""

    def with_values(frozen: Frozen, trainable: Trainable | None) -> Frozen:
        leaves = tree.named_leaves(frozen.params)
        new = {}
        for place in frozen.plan.places:
            slots = None if trainable is None else trainable[place.path]
            new[place.path] = put(leaves[place.path], place, frozen.state[place.path], slots)
        plan = replace(frozen.plan, closed=trainable is not None)
        return replace(frozen, params=tree.replace(frozen.params, new), plan=plan)

    def close(frozen: Frozen, trainable: Trainable) -> tuple[Frozen, Trainable]:
        return with_values(frozen, trainable), trainable

    def open_base(frozen: Frozen, trainable: Trainable) -> tuple[Frozen, Trainable]:
        return with_values(frozen, None) if frozen.plan.closed else frozen, trainable

    return Placement(open_base, close, stays_closed=True)
