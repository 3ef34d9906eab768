"""What methods of pre-training share: weights that leave the frozen parameters, and the other parameters."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from peftjax.core import tree
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.weights.base import Weight

REST = "value"
"""The slot of a parameter that is trained as it is."""


def without_targets(
    params: Params, paths: Collection[str], *, train_rest: bool
) -> tuple[dict[str, dict[str, Any]], Params]:
    """Take the named weights and, with `train_rest`, every other floating-point array out of the parameters.

    Returns:
        `{path: {"value": array}}` of those others, and the parameters with holes for all of them.
    """
    others = tree.not_parameters(params)
    rest = {
        path: {REST: leaf}
        for path, leaf in tree.named_leaves(params).items()
        if train_rest and path not in paths and path not in others and _is_plain(leaf)
    }
    return rest, tree.partition(params, [*paths, *rest])[1]


def with_targets(frozen: Frozen, trainable: Trainable, weights: Mapping[str, Weight]) -> Params:
    """The parameters with the rest as trained and the weights in their places."""
    rest = {path: slots[REST] for path, slots in trainable.items() if path not in weights}
    return tree.join(frozen.params, {**rest, **weights})


def _is_plain(leaf: Any) -> bool:
    return not isinstance(leaf, tree.Opaque) and jnp.issubdtype(leaf.dtype, jnp.floating)
