"""The base's own numbers, for methods whose frozen factors follow from them."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from peftjax.core.linalg import Svd, svd_of
from peftjax.methods._targets import Target
from peftjax.weights.base import dense
from peftjax.weights.canonical import to_canonical
from peftjax.weights.sharding import whole


def base_matrices(target: Target, base: object) -> Float[Array, "*stack n m"]:
    """The chosen matrices of a target, formed in float32; its base may be codes."""
    w = to_canonical(whole(dense(base)), target.layout).astype(jnp.float32)
    return w if target.layers is None else w[jnp.asarray(target.layers)]


def principal(w: Float[Array, "*stack n m"], rank: int) -> Svd:
    """The first directions of an SVD; the largest number of each direction on the input side is positive.

    A decomposition leaves the sign of each pair of directions open, and what is trained between them depends
    on it: so it is the same on every machine.
    """
    svd = svd_of(w)
    u, vt = svd.u[..., :rank], svd.vt[..., :rank, :]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)
    sign = jnp.where(largest < 0.0, -1.0, 1.0)
    return Svd(u * sign, svd.sizes[..., :rank], vt * sign.swapaxes(-1, -2))


def on_chosen(factor: Array, target: Target) -> Array:
    """A factor of all layers `[*stack, r, n]`, zero for those that are not chosen."""
    if target.layers is None:
        return factor
    chosen = jnp.zeros(target.layout.stack[0], bool).at[jnp.asarray(target.layers)].set(True)
    return jnp.where(chosen.reshape(-1, *(1,) * (factor.ndim - 1)), factor, 0.0)
