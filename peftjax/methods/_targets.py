"""Which weights a method adapts: the search that all methods with factors share."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import naming, tree
from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.core.targets import (
    Targets,
    pattern_value,
    require_experts_named,
    require_patterns_used,
    select,
)
from peftjax.weights.layout import Layout, layout_of


@dataclass(frozen=True)
class Target:
    """One weight to adapt: static facts, known before training."""

    path: str
    layout: Layout
    rank: int
    layers: tuple[int, ...] | None = None  # of the first stack axis; None means all

    @property
    def stack(self) -> tuple[int, ...]:
        """The stack shape of the trained factors."""
        stack = self.layout.stack
        return stack if self.layers is None else (len(self.layers), *stack[1:])


def find_targets(
    params: Any,
    *,
    caller: str,
    rank: int,
    targets: Targets,
    exclude: Targets | None,
    layers: int | Sequence[int] | None,
    layers_pattern: str | None,
    rank_pattern: Mapping[str, int] | None,
    layouts: Mapping[str, str] | None,
    one_way: bool = False,
) -> list[Target]:
    """Every weight that the options ask for.

    Args:
        params: the parameters.
        caller: the method's name, for the errors.
        rank: r of every weight that `rank_pattern` does not name.
        targets: as in `lora`.
        exclude: as in `lora`.
        layers: as in `lora`.
        layers_pattern: as in `lora`.
        rank_pattern: as in `lora`.
        layouts: as in `lora`.
        one_way: whether it matters which side of a weight is the input, as in `layout_of`.

    Raises:
        PeftError: nothing, or only part of a list, is matched; a pattern or a layer number is not
            used; a rank is not positive or larger than the matrix; 'all-linear' meets experts.
    """
    leaves = tree.named_leaves(params)
    paths = select(params, targets, caller=caller, exclude=exclude)
    require_experts_named(caller, targets, paths)
    if layers is not None:
        wanted = (layers,) if isinstance(layers, int) else tuple(sorted({int(layer) for layer in layers}))
        picked = {path: _layers_of(path, leaves, wanted, layers_pattern, layouts) for path in paths}
        _require_layers_exist(caller, wanted, picked)
        paths = [path for path in paths if picked[path] != ()]
    else:
        picked = dict.fromkeys(paths)
    for patterns in (rank_pattern, layouts):
        require_patterns_used(caller, patterns, paths)
    found = []
    for path in paths:
        layout = layout_of(path, leaves, layouts, one_way=one_way)
        own_rank = pattern_value(path, rank_pattern, rank)
        positive(caller, "rank", own_rank, path=path)
        if own_rank > min(layout.matrix):
            raise PeftError(
                f"{caller}: rank {own_rank} is larger than {path!r}, a matrix of "
                f"{layout.matrix[0]} x {layout.matrix[1]}; lower rank, set rank_pattern, or exclude it"
            )
        # Where the path tells the layer, a stack is one of experts, all of which it takes.
        stacked = picked[path] if naming.layer_index(path, layers_pattern) is None else None
        found.append(Target(path, layout, own_rank, stacked))
    return found


def _layers_of(
    path: str,
    leaves: Mapping[str, Any],
    wanted: tuple[int, ...],
    layers_pattern: str | None,
    layouts: Mapping[str, str] | None,
) -> tuple[int, ...]:
    """Which of the wanted layers this weight holds: by its name, or by its first stack axis."""
    index = naming.layer_index(path, layers_pattern)
    if index is not None:
        return (index,) if index in wanted else ()
    stack = layout_of(path, leaves, layouts).stack
    return tuple(layer for layer in wanted if stack and 0 <= layer < stack[0])


def _require_layers_exist(
    caller: str, wanted: tuple[int, ...], picked: Mapping[str, tuple[int, ...]]
) -> None:
    if not wanted:
        raise PeftError(f"{caller}: layers names no layer; give at least one number, or None for all")
    held = {layer for layers in picked.values() for layer in layers}
    for layer in wanted:
        if layer not in held:
            raise PeftError(f"{caller}: no target lies in layer {layer}; targets: {tree.nearest('', picked)}")


def key_for(key: Array, path: str) -> Array:
    """A key of the parameter's own, the same whatever else is adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def keys_of_matrices(key: Array | None, target: Target) -> Array | None:
    """A key for each matrix of the target's whole stack."""
    if key is None:
        return None
    own = key_for(key, target.path)
    return jax.random.split(own, target.layout.stack) if target.layout.stack else own


def all_layers(values: Array, target: Target, fill: float = 0.0) -> Array:
    """The values of the chosen layers, with `fill` for the others, so that a scan can take them."""
    if target.layers is None:
        return values
    return on_layers(values, target.layers, target.layout.stack[0], fill)


def on_layers(values: Array, layers: Sequence[int], num_layers: int, fill: float = 0.0) -> Array:
    """[num_layers, ...] with the values [len(layers), ...] at those layers and `fill` at the others."""
    if len(layers) == num_layers:
        return values
    whole = jnp.full((num_layers, *values.shape[1:]), fill, values.dtype)
    return whole.at[jnp.asarray(layers)].set(values)
