"""One block of a backbone at a time: its parameters, and what differs between it and the others."""

from typing import Any

import jax
import numpy as np
from jax import Array, lax

from peftjax.backbone.backbone import Backbone


@jax.jit
def cut(leaves: Any, number: int | Array) -> Any:
    """One block's part of arrays `[L, ...]`, as a stack of one."""
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, number, 1, 0), leaves)


def own_of(backbone: Backbone, number: int) -> dict[str, Any]:
    """What differs between the layers, of one of them."""
    own = {name: np.asarray(values)[number] for name, values in backbone.per_layer.items()}
    return {**own, "layer": np.int32(number)}
