"""The base's own numbers, for methods whose frozen factors follow from them."""

from collections.abc import Mapping

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


def chosen(target: Target) -> dict[str, Array]:
    """A slot that says which layers of a stack are chosen, where not all are: 1 or 0, `[*stack]`."""
    if target.layers is None:
        return {}
    on = jnp.zeros(target.layout.stack[0]).at[jnp.asarray(target.layers)].set(1.0)
    return {
        "on": jnp.broadcast_to(on.reshape(-1, *(1,) * (len(target.layout.stack) - 1)), target.layout.stack)
    }


def of_chosen(factor: Array, slots: Mapping[str, Array]) -> Array:
    """A factor of one matrix, zero in a layer that is not chosen."""
    return slots["on"] * factor if "on" in slots else factor
