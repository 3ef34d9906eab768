"""The model without the units that are gone, in smaller arrays, and the way back for what is trained."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from peftjax.backbone.backbone import Backbone
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.prune.group import Group, Groups, Member
from peftjax.prune.masking import require_masks
from peftjax.prune.sizes import with_sizes
from peftjax.weights.base import Weight
from peftjax.weights.layout import Layout, layout_of


@dataclass(frozen=True)
class Recipe:
    """What was kept of a model, with which what is trained on the small one is put into the large one.

    Attributes:
        groups: of the large model.
        kept: the numbers of the units that stayed, ascending, `[*stack, k]` by group.
        shapes: of the large model's parameters, by path.
        layouts: as in `lora`.
    """

    groups: Groups
    kept: Mapping[str, Int[np.ndarray, "*stack k"]]
    shapes: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, str] | None = None

    @property
    def order(self) -> list[str]:
        """The groups as they are cut: those inside of others first, layers last."""
        last = {"layer": 1}
        return sorted(
            self.kept, key=lambda name: (last.get(self.groups[name].kind, 0), -len(self.groups[name].stack))
        )


class Sliced(NamedTuple):
    """A smaller model.

    Attributes:
        model: the backbone with the new sizes; a function as it was, which has to read sizes from its
            parameters.
        params: smaller arrays.
        recipe: the way back, for `recover`.
    """

    model: Callable[..., Any]
    params: Any
    recipe: Recipe


def sliced(
    model: Callable[..., Any],
    params: Any,
    groups: Groups,
    kept: Mapping[str, Array],
    *,
    layouts: Mapping[str, str] | None = None,
) -> Sliced:
    """The model without the units that are not kept; its function is that of `masked`.

    Layers are stacked in arrays `[L, ...]`, which stay rectangular: every layer has to keep the same number
    of heads, of neurons and of experts, as `select` gives per layer. Which ones may differ. Blocks of a
    backbone have one number of heads, of self-attention and of cross-attention.

    Args:
        model: as of `groups_of`.
        params: its parameters, arrays: slice first, and code or adapt after it.
        groups: of `groups_of`.
        kept: of `select`, boolean `[*stack, count]` by group. Other groups stay whole.
        layouts: as in `lora`, for `recover`.

    Raises:
        PeftError: a mask is of no group, of another shape, empty or not rectangular; a weight is no array;
            the blocks cannot have these sizes.
    """
    small, recipe = cut(model, params, groups, kept, layouts=layouts)
    return Sliced(small, take(params, recipe), recipe)


def cut(
    model: Callable[..., Any],
    params: Any,
    groups: Groups,
    kept: Mapping[str, Array],
    *,
    layouts: Mapping[str, str] | None = None,
) -> tuple[Callable[..., Any], Recipe]:
    """The model of `sliced` and its recipe, of parameters or of their shapes.

    Raises:
        PeftError: as `sliced`.
    """
    require_masks("sliced", groups, kept)
    _require_apart(groups, kept)
    numbers = {name: _numbers(name, np.asarray(own)) for name, own in kept.items()}
    leaves = tree.named_leaves(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items() if tree.is_array(leaf)}
    small = with_sizes(model, numbers) if isinstance(model, Backbone) else model
    return small, Recipe(groups, numbers, shapes, layouts)


def take(params: Any, recipe: Recipe) -> Any:
    """The parameters of the small model from those of the large one.

    Raises:
        PeftError: a weight is no array.
    """
    leaves = tree.named_leaves(params)
    changed: dict[str, Any] = {}
    for name in recipe.order:
        group, numbers = recipe.groups[name], recipe.kept[name]
        for (path, axis), members in _by_axis(group).items():
            leaf = changed.get(path, leaves[path])
            if isinstance(leaf, Weight):
                raise PeftError(
                    f"sliced: {path!r} is a {type(leaf).__name__}; slice the arrays, and code or adapt them "
                    "after it"
                )
            places = _places(members, group, numbers, recipe.shapes[path][axis])
            changed[path] = _taken(leaf, places, axis)
    return tree.replace(params, changed)


def recover(recipe: Recipe, trainable: Mapping[str, Any]) -> dict[str, Any]:
    """What was trained on the small model, for the large one (LoRAM, Zhang et al. 2025, arXiv 2502.13533).

    Low-rank factors get zeros where units are gone, rows of b or columns of a, so that the change of every
    weight is the small model's on what was kept and 0 elsewhere. What has the same shape in both models
    stays.

    Args:
        recipe: of `sliced`.
        trainable: factors a `[*stack, r, in]` and b `[*stack, r, out]` by path, of `lora` and its relatives.

    Raises:
        PeftError: something else than factors was trained of a weight, or of layers, that were cut.
    """
    names = [name for name in recipe.kept if recipe.groups[name].kind == "layer"]
    stacks = tuple(f"{name.removesuffix('layers')}blocks/" for name in names)
    members = {member.path for name in recipe.kept for member in recipe.groups[name].members}
    found = {}
    for path, own in trainable.items():
        if path not in members and not path.startswith(stacks):
            found[path] = own
            continue
        if path not in members or not isinstance(own, Mapping) or set(own) != {"a", "b"}:
            raise PeftError(
                f"recover: {path!r} was cut, and what is trained of it has no place in the large model; "
                "train low-rank factors (pj.lora) on the sliced model"
            )
        found[path] = _recovered(recipe, path, own)
    return found


def _recovered(recipe: Recipe, path: str, own: Mapping[str, Array]) -> dict[str, Array]:
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in recipe.shapes.items()}
    layout = layout_of(path, shapes, recipe.layouts)
    factors = dict(own)
    for name in reversed(recipe.order):
        group, numbers = recipe.groups[name], recipe.kept[name]
        for (at, axis), members in _by_axis(group).items():
            if at != path:
                continue
            size = recipe.shapes[path][axis]
            places = _places(members, group, numbers, size)
            kind = layout.axes[axis].kind
            for factor, side in (("a", "i"), ("b", "o")):
                array = factors[factor]
                if kind == "s":
                    factors[factor] = _scattered(array, places, layout.positions("s").index(axis), size)
                elif kind == side:
                    own_axes = [recipe.shapes[path][p] for p in layout.positions(side)]
                    factors[factor] = _scattered_side(array, places, layout, axis, own_axes)
    return factors


def _scattered_side(array: Array, places: Any, layout: Layout, axis: int, sizes: list[int]) -> Array:
    """Numbers of one side `[*stack, r, n]`, the side's axes apart while one of them grows."""
    side = layout.axes[axis].kind
    at = layout.positions(side).index(axis)
    lead = array.ndim - 1
    have = list(sizes)
    have[at] = places.shape[-1]
    apart = array.reshape(*array.shape[:-1], *have)
    grown = _scattered(apart, places, lead + at, sizes[at])
    return grown.reshape(*array.shape[:-1], -1)


def _scattered(array: Array, places: Int[np.ndarray, "*stack n"], axis: int, size: int) -> Array:
    """Zeros of that size along an axis, with the array at the places."""
    shape = list(array.shape)
    shape[axis] = size
    index = jnp.broadcast_to(_index(array.ndim, places, axis), array.shape)
    return jnp.put_along_axis(jnp.zeros(shape, array.dtype), index, array, axis, inplace=False)


def _taken(leaf: Any, places: Int[np.ndarray, "*stack n"], axis: int) -> Any:
    if places.ndim == 1:
        return jnp.take(leaf, places, axis=axis)
    return jnp.take_along_axis(leaf, jnp.asarray(_index(leaf.ndim, places, axis)), axis)


def _index(ndim: int, places: Int[np.ndarray, "*stack n"], axis: int) -> Int[np.ndarray, "..."]:
    lead = places.ndim - 1
    shape = [*places.shape[:lead], *(1,) * (ndim - lead)]
    shape[axis] = places.shape[-1]
    return places.reshape(shape)


def _by_axis(group: Group) -> dict[tuple[str, int], list[Member]]:
    found: dict[tuple[str, int], list[Member]] = {}
    for member in group.members:
        found.setdefault((member.path, member.axis), []).append(member)
    return found


def _places(
    members: Iterable[Member], group: Group, numbers: Int[np.ndarray, "*stack k"], size: int
) -> Int[np.ndarray, "*stack n"]:
    """What stays of an axis: the places of the units that do, and those where no unit lies."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    found = []
    for row in rows:
        stays = np.ones(size, bool)
        for member in members:
            places = member.places(group.count)
            stays[places.ravel()] = False
            stays[places[:, row].ravel()] = True
        found.append(np.flatnonzero(stays))
    return np.stack(found).reshape(*numbers.shape[:-1], -1)


def _require_apart(groups: Groups, kept: Iterable[str]) -> None:
    """Raise a PeftError where two groups cut one axis, whose places the first cut would change."""
    seen: dict[tuple[str, int], str] = {}
    for name in kept:
        for path, axis in _by_axis(groups[name]):
            if (other := seen.setdefault((path, axis), name)) != name:
                raise PeftError(
                    f"sliced: {name!r} and {other!r} both cut axis {axis} of {path!r}; slice by one, and "
                    "find the groups of what is left for the other"
                )


def _numbers(name: str, kept: np.ndarray) -> Int[np.ndarray, "*stack k"]:
    """The numbers of what is kept."""
    rows = kept.reshape(-1, kept.shape[-1])
    counts = sorted(set(rows.sum(-1).tolist()))
    if len(counts) > 1:
        raise PeftError(
            f"sliced: the layers keep from {counts[0]} to {counts[-1]} units of {name!r}, and their arrays "
            "are stacked: select with scope='layer', or run the `masked` model"
        )
    if counts[0] == 0:
        raise PeftError(f"sliced: no unit of {name!r} is kept; keep one at least")
    return np.stack([np.flatnonzero(row) for row in rows]).reshape(*kept.shape[:-1], counts[0])
