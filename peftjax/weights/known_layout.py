"""The layout of a parameter in a tree: its own, the one given, or the one that its name tells."""

from collections.abc import Mapping
from typing import Any

from peftjax import tree
from peftjax.weights.base import Weight
from peftjax.weights.layout import Layout, guess_layout


def layout_of(path: str, leaves: Mapping[str, Any], layouts: Mapping[str, str] | None) -> Layout:
    """The layout of a weight: its own, the one given, or the one its name tells."""
    leaf = leaves[path]
    if isinstance(leaf, Weight):
        return leaf.layout
    bias = leaves.get(f"{tree.module_of(path)}/bias")
    guess = guess_layout(path, leaf.shape, getattr(bias, "shape", None))
    return Layout.parse(tree.pattern_value(path, layouts, guess), leaf.shape, path)
