"""The model with units or entries gone, in its old shape; and with a gate for each unit."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.backbone.rewriting import require_backbone
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.naming import is_weight
from peftjax.prune.group import Group, Groups, Member
from peftjax.prune.layers import skippable, with_layers
from peftjax.weights.base import Weight
from peftjax.weights.diagonal import Diagonal
from peftjax.weights.layout import Layout, layout_of
from peftjax.weights.shifted import Shifted


class Masked(NamedTuple):
    """A model in which some units do nothing.

    Attributes:
        model: to be run through `pj.adapt`.
        params: of the shapes that they had.
    """

    model: Callable[..., Any]
    params: Any


def masked(
    model: Callable[..., Any],
    params: Any,
    groups: Groups,
    kept: Mapping[str, Array],
    *,
    layouts: Mapping[str, str] | None = None,
) -> Masked:
    """The model in which the units that are not kept do nothing: what `sliced` gives, in the old shapes.

    All the numbers of a unit are zero. A router never chooses an expert that is gone: its logit is -∞, as a
    structured weight, so run the model with `pj.adapt`. A layer that is gone is skipped, by a parameter
    `kept`.

    Args:
        model: as of `groups_of`.
        params: its parameters.
        groups: of `groups_of`.
        kept: of `select`, boolean `[*stack, count]` by group; may be traced. Other groups stay whole.
        layouts: as in `lora`, of structured weights.

    Raises:
        PeftError: a mask is of no group, or of another shape.
    """
    leaves = tree.named_leaves(params)
    require_masks("masked", groups, kept)
    changed: dict[str, Any] = {}
    layers = {}
    for name, own in kept.items():
        group = groups[name]
        if group.kind == "layer":
            layers[name] = own
            continue
        for member in group.members:
            leaf = changed.get(member.path, leaves[member.path])
            along = _along(own, member, group, leaf.shape[member.axis], 1)
            if group.kind == "expert" and not member.reads:
                changed[member.path] = _unreachable(leaf, along, member, leaves, layouts)
            elif group.kind != "expert" or not isinstance(leaf, Weight):  # which nothing reaches as it is
                changed[member.path] = _times(leaf, along, member, group, leaves, layouts)
    params = tree.replace(params, changed)
    if not layers:
        return Masked(model, params)
    return Masked(skippable(require_backbone("masked", model)), with_layers(params, layers))


def gated(
    params: Any, groups: Groups, gates: Mapping[str, Array], *, layouts: Mapping[str, str] | None = None
) -> Any:
    """The parameters in which what each unit gives is multiplied by its gate, for `pj.adapt` of any model.

    The weight that reads the units takes `x ∘ gate`, so that a gate's gradient needs no gradient of a weight
    (Light-PEFT's masks, LoRAPrune's). Gates of one are the model as it was.

    Args:
        params: the parameters, structured weights included.
        groups: of `groups_of`: heads, neurons or filters.
        gates: `[*stack, count]` by group, differentiable.
        layouts: as in `lora`.

    Raises:
        PeftError: a gate is of no group, or of another shape; a group has no weight that reads it by its
            inputs.
    """
    leaves = tree.named_leaves(params)
    require_masks("gated", groups, gates)
    changed: dict[str, Any] = {}
    for name, own in gates.items():
        group = groups[name]
        readers = [member for member in group.members if member.reads]
        if group.kind in ("expert", "layer") or not readers:
            raise PeftError(f"gated: no weight reads the units of {name!r}, a group of kind {group.kind!r}")
        for member in readers:
            leaf = changed.get(member.path, leaves[member.path])
            along = _along(own, member, group, leaf.shape[member.axis], 1)
            changed[member.path] = _scaled(leaf, along, member, leaves, layouts)
    return tree.replace(params, changed)


def with_entries(params: Any, kept: Mapping[str, Array]) -> Any:
    """The parameters in which entries that are not kept are zero.

    Args:
        params: the parameters; the weights are arrays.
        kept: of `select_entries` or `select_n_of_m`, by path.

    Raises:
        PeftError: a mask is of no parameter, of another shape, or of a structured weight.
    """
    leaves = tree.named_leaves(params)
    changed = {}
    for path, own in kept.items():
        leaf = leaves.get(path)
        if leaf is None:
            raise PeftError(
                f"with_entries: no parameter is called {path!r}; closest: {tree.nearest(path, leaves)}"
            )
        if isinstance(leaf, Weight) or leaf.shape != own.shape:
            raise PeftError(
                f"with_entries: {path!r} is a {type(leaf).__name__} of shape {leaf.shape}, the mask of shape "
                f"{own.shape}; mask the arrays, and code or adapt them after it"
            )
        changed[path] = jnp.where(own, leaf, 0)
    return tree.replace(params, changed)


def require_masks(caller: str, groups: Groups, given: Mapping[str, Any]) -> None:
    """Raise a PeftError where something given is of no group or has another shape."""
    for name, own in given.items():
        if name not in groups:
            raise PeftError(f"{caller}: there is no group {name!r}; closest: {tree.nearest(name, groups)}")
        if tuple(np.shape(own)) != groups[name].shape:
            raise PeftError(
                f"{caller}: {name!r} has the shape {tuple(np.shape(own))}; the group's is "
                f"{groups[name].shape}"
            )


def _along(units: Array, member: Member, group: Group, size: int, rest: Any) -> Array:
    """A number for every place of a member's axis, `[*stack, size]`; `rest` where no unit lies."""
    units = jnp.asarray(units)
    places = member.places(group.count)
    each = jnp.broadcast_to(units[..., None, :, None], (*group.stack, *places.shape))
    whole = jnp.full((*group.stack, size), rest, units.dtype)
    return whole.at[..., places.reshape(-1)].set(each.reshape(*group.stack, -1))


def _times(
    leaf: Any, along: Array, member: Member, group: Group, leaves: Mapping[str, Any], layouts: Any
) -> Any:
    if isinstance(leaf, Weight):
        return _scaled(leaf, along, member, leaves, layouts)
    lead = len(group.stack)
    shape = [*along.shape[:lead], *(1,) * (leaf.ndim - lead)]
    shape[member.axis] = along.shape[-1]
    keep = along.reshape(shape)
    return jnp.where(keep, leaf, jnp.zeros((), leaf.dtype)) if keep.dtype == bool else leaf * keep


def _scaled(leaf: Any, along: Array, member: Member, leaves: Mapping[str, Any], layouts: Any) -> Diagonal:
    layout = leaf.layout if isinstance(leaf, Weight) else layout_of(member.path, leaves, layouts)
    side = layout.axes[member.axis].kind
    if side not in ("i", "o"):
        raise PeftError(
            f"prune: axis {member.axis} of {member.path!r} is no input and no output; give layouts"
        )
    own = tuple(layout.sizes(side))
    whole = jnp.broadcast_to(_between(along, layout, member), (*layout.stack, *own)).reshape(
        *layout.stack, -1
    )
    wide = whole.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return Diagonal(leaf, layout, **{"by_input" if side == "i" else "by_output": wide})


def _between(along: Array, layout: Layout, member: Member) -> Array:
    """`[*stack, size]` with an axis for every axis of the weight's side, and for all of its stack."""
    side = layout.axes[member.axis].kind
    positions = layout.positions(side)
    lead = along.ndim - 1
    missing = len(layout.stack) - lead
    shape = [*along.shape[:lead], *(1,) * missing, *(1,) * len(positions)]
    shape[lead + missing + positions.index(member.axis)] = along.shape[-1]
    return along.reshape(shape)


def _unreachable(leaf: Any, along: Array, member: Member, leaves: Mapping[str, Any], layouts: Any) -> Any:
    """A router's weight whose result is -∞ for the experts that are gone; a bias stays as it is."""
    if not is_weight(member.path, leaf, leaves):
        return leaf
    layout = leaf.layout if isinstance(leaf, Weight) else layout_of(member.path, leaves, layouts)
    shift = jnp.where(along, 0.0, -jnp.inf).astype(jnp.float32)
    return Shifted(leaf, shift, layout)
