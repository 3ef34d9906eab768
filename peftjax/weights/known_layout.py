"""The layout of a parameter in a tree: its own, the one given, or the one that its name tells."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftjax.core import tree
from peftjax.weights.base import Weight
from peftjax.weights.layout import Layout, guess_layout, tells_its_layout


def layout_of(
    path: str, leaves: Mapping[str, Any], layouts: Mapping[str, str] | None, *, one_way: bool = False
) -> Layout:
    """The layout of a weight: its own, the one given, or the one its name tells.

    Args:
        path: of the weight.
        leaves: all parameters by path.
        layouts: letters by pattern.
        one_way: whether the method depends on which side is the input: a guess that the name does not
            support is then held to.
    """
    leaf = leaves[path]
    if isinstance(leaf, Weight):
        return leaf.layout
    bias = leaves.get(f"{tree.module_of(path)}/bias")
    guess = guess_layout(path, leaf.shape, getattr(bias, "shape", None))
    given = tree.pattern_value(path, layouts, None)
    layout = Layout.parse(given or guess, leaf.shape, path)
    # The kernels of transposed convolutions have the same names, and outputs before inputs.
    told = tells_its_layout(path) and not tree.is_convolution(path, leaf.ndim)
    return replace(layout, one_way=one_way and given is None and not told)
