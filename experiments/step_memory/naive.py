"""SNELL written down as its formula, for autodiff to differentiate: what its closed form is measured against.

    D_p[i, j] = ‖a[p, :, i] - b[p, :, j]‖,   W' = W + dW · |dW| · 1[|dW| > t],   dW = Σ_p c_p D_p

with the differences `[P, q, n, m]` as an array and W' of all layers made before the model runs. Factors,
start and thresholds are those of the library's SNELL.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

import peftjax as pj
from peftjax.core import tree
from peftjax.weights.canonical import to_logical


def naive(snell: pj.Transform) -> pj.Transform:
    """The same method with plain arrays as weights."""

    def apply(frozen: pj.Frozen, trainable: Mapping[str, Any], *, key: Array | None = None) -> Any:
        weights = snell.apply(frozen, trainable)
        return tree.map_named(lambda _, w: _plain(w) if isinstance(w, pj.Weight) else w, weights)

    return replace(snell, name="naive", apply=apply)


def _plain(w: Any) -> Array:
    """`w` of the released sparsifier and the distance kernel as an array."""
    differences = w.a[..., :, None] - w.b[..., None, :]
    distances = jnp.sqrt(jnp.sum(jnp.square(differences), axis=-3))
    update = sum(c * distances[..., head, :, :] for head, c in enumerate(w.kernel_function.coefficients))
    size = lax.stop_gradient(jnp.abs(update))
    update = update * jnp.where(size > w.threshold[..., None, None], size, 0)
    return w.base + to_logical(update, w.layout)
