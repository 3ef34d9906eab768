"""Gradient-mask sparse tuning: the dense form that the papers of SNELL and SNELLA compare with.

    dW <- dW ∘ M,   M a fixed 0/1 mask,   dense gradient and dense AdamW moments for every adapted weight

as in GPS and other methods that train chosen entries with an unchanged optimizer. It is here only to be
measured: the masks are random, as which entries are trained does not change the memory. They are kept as
booleans, the smallest form that needs no unpacking; a float mask would take three bytes more a weight. The
gradient is masked layer by layer: masked all at once, it exists twice (a quarter of the weights on ViT-B/16).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import peftjax as pj
from peftjax.core import tree
from peftjax.core.targets import select
from peftjax.weights.fields import logical, static, structured
from peftjax.weights.layout import Layout, layout_of


@jax.custom_vjp
def mask_gradient(w: Array, mask: Array) -> Array:
    """`w`, whose gradient is zero where the mask is False."""
    return w


mask_gradient.defvjp(lambda w, mask: (w, mask), lambda mask, g: (jnp.where(mask, g, 0), None))


@structured
class Masked(pj.Weight):
    """A trained array of which only the entries in the mask, of the same shape, get a gradient."""

    base: Any = logical()
    mask: Array = logical()
    layout: Layout = static()

    def dense(self) -> Array:
        """The array."""
        return mask_gradient(self.base, self.mask)


def masked(share: float = 0.01) -> pj.Transform:
    """Train a random `share` of the entries of all linear layers; weight decay would move the others."""

    def init(key: Array, params: Any) -> tuple[pj.Frozen, dict[str, Array]]:
        paths = select(params, "all-linear", caller="masked")
        taken, rest = tree.partition(params, paths)
        keys = jax.random.split(key, len(paths))
        masks = {path: jax.random.bernoulli(k, share, taken[path].shape) for path, k in zip(paths, keys)}
        layouts = tuple((path, layout_of(path, taken, None)) for path in paths)
        return pj.Frozen(rest, masks, layouts), taken

    def apply(frozen: pj.Frozen, trainable: Mapping[str, Array], *, key: Array | None = None) -> Any:
        weights = {path: Masked(trainable[path], frozen.state[path], layout) for path, layout in frozen.plan}
        return tree.join(frozen.params, weights)

    return pj.Transform("masked", {"share": share}, init, apply)
