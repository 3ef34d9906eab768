"""What a method changed in its parameters: factors beside them, or the parameters themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.hf.names import Names
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import find_method
from peftjax.weights.column_normalized import ColumnNormalized
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank
from peftjax.weights.rows import TrainedRows
from peftjax.weights.shifted import Shifted


@dataclass(frozen=True)
class Factors:
    """One adapted parameter: `scale · aᵀb` on all its layers, and DoRA's magnitudes."""

    layout: Layout
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None
    untouched: np.ndarray | None  # the magnitudes of a layer that nothing adapts
    shift: np.ndarray | None = None  # the bias of a layer that has none


def trained_rows(frozen: Frozen, leaves: Mapping[str, Any]) -> dict[str, TrainedRows]:
    """The plain parameters of which some rows are trained."""
    kept = tree.named_leaves(frozen.params)
    return {
        path: leaf
        for path, leaf in leaves.items()
        if isinstance(leaf, TrainedRows) and leaf.base is kept.get(path)
    }


def changed_parameters(frozen: Frozen, leaves: Mapping[str, Any]) -> tuple[dict[str, Factors], set[str]]:
    """The parameters with low-rank factors, and those trained as they are.

    Raises:
        PeftError: a weight has a form, or the method adds parameters, for which the format has no place.
    """
    kept = tree.named_leaves(frozen.params)
    factors, trained = {}, set()
    for path, leaf in leaves.items():
        if path not in kept:
            raise PeftError(
                f"{path!r} is added to the model by its method, for which PEFT's LoRA format has no place; "
                "keep the adapter in peftjax's own format"
            )
        if isinstance(kept[path], tree.Hole):
            trained.add(path)
        elif leaf is not kept[path]:
            factors[path] = _factors(path, leaf)
    return factors, trained


def _factors(path: str, leaf: Any) -> Factors:
    if isinstance(leaf, Shifted):
        return replace(_factors(path, leaf.base), shift=np.asarray(leaf.shift))
    magnitude = untouched = shift = None
    if isinstance(leaf, ColumnNormalized):
        magnitude, untouched = np.asarray(leaf.magnitude), np.sqrt(np.asarray(leaf.base_squares))
        leaf = leaf.base
    if not isinstance(leaf, LowRank):
        raise PeftError(
            f"{path!r} is a {type(leaf).__name__}, which PEFT's LoRA format has no form for; merge the "
            "adapter and save the model instead"
        )
    a, b, scale = np.asarray(leaf.a), np.asarray(leaf.b), leaf.scale
    if isinstance(leaf.base, LowRank | ColumnNormalized | Shifted):
        inner = _factors(path, leaf.base)
        shift = inner.shift
        if magnitude is not None or inner.magnitude is not None:
            raise PeftError(f"{path!r} has DoRA over or under another adapter; merge one of them first")
        a = np.concatenate([inner.a, a], axis=-2)
        b = np.concatenate([inner.scale * inner.b, scale * b], axis=-2)
        scale = 1.0
    return Factors(leaf.layout, a, b, scale, magnitude, untouched, shift)


def trained_as_they_are(
    frozen: Frozen, paths: Iterable[str], also: Collection[str], leave_out: Sequence[str]
) -> set[str]:
    """The parameters that are trained themselves, or written though they are not, without those left out."""
    kept = tree.named_leaves(frozen.params)
    found = {path for path in paths if isinstance(kept.get(path), tree.Hole)} | {*also}
    return {path for path in found if not lies_in(path, leave_out)}


def require_named(paths: Iterable[str], names: Names) -> None:
    """Raise a PeftError for something trained that a Hugging Face class has no tensor for."""
    for path in paths:
        if path in names.unnamed:
            raise PeftError(
                f"{path!r} was trained, but {names.architecture} has no such tensor; "
                f"leave_out={[tree.module_of(path)]} exports the adapter without it"
            )


def lies_in(name: str, parts: Sequence[str]) -> bool:
    """Whether a path is one of `parts` or lies in one of them."""
    return any(name == part or name.startswith(f"{part}/") for part in parts)


def without(
    paths: Sequence[str],
    factors: Mapping[str, Factors],
    trained: set[str],
    rows: Mapping[str, TrainedRows],
) -> tuple[dict[str, Factors], set[str], dict[str, TrainedRows]]:
    """All three without the parameters in `paths`.

    Raises:
        PeftError: a path names none of them.
    """
    for part in paths:
        hits = [name for name in (*factors, *trained, *rows) if lies_in(name, (part,))]
        if not hits:
            near = tree.nearest(part, [*factors, *trained, *rows])
            raise PeftError(f"leave_out: {part!r} is not trained; closest: {near}")
    return (
        {name: own for name, own in factors.items() if not lies_in(name, paths)},
        {name for name in trained if not lies_in(name, paths)},
        {name: own for name, own in rows.items() if not lies_in(name, paths)},
    )


def difference(now: Factors, first: Factors) -> Factors:
    """`scale (aᵀb − a₀ᵀb₀)` as factors of twice the rank."""
    a = np.concatenate([now.a, first.a], axis=-2)
    b = np.concatenate([now.b, -first.b], axis=-2)
    return Factors(now.layout, a, b, now.scale, None, None, now.shift)


def method_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configurations of a chain's methods, or the method's own."""
    if config["name"] != "chain":
        return [config]
    return [part for method in config["methods"] for part in method_parts(method)]


def _adapting(
    config: Mapping[str, Any], plan: Any, trainable: Trainable, path: str
) -> list[Mapping[str, Any]]:
    """The configurations of the methods that adapt or train a parameter."""
    if config["name"] == "chain":
        return [
            part
            for method, (name, own) in zip(config["methods"], plan)
            for part in _adapting(method, own, trainable[name], path)
        ]
    return [config] if path in trainable else []


def on_residuals(config: Mapping[str, Any], plan: Any, trainable: Trainable) -> set[str]:
    """The parameters whose base the method replaced by another."""
    if config["name"] == "chain":
        pairs = zip(config["methods"], plan)
        return set().union(*(on_residuals(method, own, trainable[name]) for method, (name, own) in pairs))
    return set(trainable) if find_method(config["name"]).replaces_base else set()


def is_rslora(config: Mapping[str, Any], plan: Any, trainable: Trainable, path: str) -> bool:
    """Whether the one method that adapts a parameter divides alpha by the rank's root."""
    adapting = _adapting(config, plan, trainable, path)
    return len(adapting) == 1 and (adapting[0]["name"] == "rslora" or adapting[0].get("rslora", False))
