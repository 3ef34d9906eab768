"""Gradient-mask sparse tuning: the dense form that the papers of SNELL and SNELLA compare with.

    dW <- dW ∘ M,   M a fixed 0/1 mask,   dense gradient and dense AdamW moments for every adapted weight

as in GPS and other methods that train chosen entries with an unchanged optimizer. It is here only to be
measured: the masks are random, as which entries are trained does not change the memory. They are kept as
booleans, the smallest form that needs no unpacking; a float mask would take three bytes more a weight.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import peftjax as pj
from peftjax import tree


@jax.custom_vjp
def mask_gradient(w: Array, mask: Array) -> Array:
    """`w`, whose gradient is zero where the mask is False."""
    return w


mask_gradient.defvjp(lambda w, mask: (w, mask), lambda mask, g: (jnp.where(mask, g, 0), None))


def masked(share: float = 0.01) -> pj.Transform:
    """Train a random `share` of the entries of all linear layers; weight decay would move the others."""

    def init(key: Array, params: Any) -> tuple[pj.Frozen, dict[str, Array]]:
        paths = tree.select(params, "all-linear", who="masked")
        taken, rest = tree.partition(params, paths)
        keys = jax.random.split(key, len(paths))
        masks = {path: jax.random.bernoulli(k, share, taken[path].shape) for path, k in zip(paths, keys)}
        return pj.Frozen(rest, masks), taken

    def apply(frozen: pj.Frozen, trainable: Mapping[str, Array], *, key: Array | None = None) -> Any:
        limited = {path: mask_gradient(w, frozen.state[path]) for path, w in trainable.items()}
        return tree.join(frozen.params, limited)

    return pj.Transform("masked", {"share": share}, init, apply)
