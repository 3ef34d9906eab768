"""The network of `unipt`, whose equations are there: functions of the states of a frozen backbone."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from peftjax.methods.blocks.features import Part, linear, linear_norm, mean_visible, recompute

Params = Any
EPSILON = 1e-5
SMALLEST_SUM = 1e-8
"""Of a row of A."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between the released task trees.

    Attributes:
        of_clip: T_l without a norm, aggregated with the last, an anchor of its own, and H_L + R's way up.
        projection: what R goes through before Q is added; None adds no Q.
        active: whether a relu comes before the way up.
    """

    of_clip: bool = False
    projection: Literal["linear", "bottleneck"] | None = "linear"
    active: bool = True


VARIANTS = {
    "vse": Variant(),
    "clip4clip": Variant(of_clip=True, projection=None),
    "clip_vil": Variant(projection="bottleneck", active=False),
}


def narrow_states(
    kind: Variant, own: Params, last: Float[Array, "B S D"], states: Float[Array, "L B S D"]
) -> tuple[Float[Array, "B S d"], Float[Array, "n B S d"]]:
    """Q, and T_l of the layers to aggregate."""

    @recompute
    def narrow(down: Part, norm: Part | None, state: Array) -> Array:
        if norm is None:
            return linear(down, jax.nn.relu(state))
        return linear_norm(down, norm, state, EPSILON)

    # A layer at a time, so that backward makes again what one layer needs.
    tokens = jax.lax.map(lambda xs: narrow(*xs), (own["down"], own.get("down_norm"), states))
    of_last = narrow(own["last"], own.get("last_norm"), last)
    if not kind.of_clip:
        return of_last, tokens
    return narrow(own["anchor"], None, last), jnp.concatenate([tokens, of_last[None]])


def confidence(
    weights: Float[Array, " d"],
    anchors: Float[Array, "B K d"],
    tokens: Float[Array, "n B K d"],
    visible: Bool[Array, "#B #Q K"],
) -> Float[Array, "n B #Q"]:
    """c: the shares of the layers, whose sum is 1."""

    @recompute
    def score(weights: Array, anchors: Array, tokens: Array) -> Array:
        pooled = mean_visible(visible, anchors) * mean_visible(visible, tokens)
        return pooled @ weights

    scores = jax.lax.map(lambda of_layer: score(weights, anchors, of_layer), tokens)
    return jax.nn.softmax(scores, axis=0)


def aggregate(
    anchor: Float[Array, "B S d"],
    tokens: Float[Array, "n B S d"],
    keys: Float[Array, "n B K d"],
    shares: Float[Array, "n B #S"],
    visible: Bool[Array, "#B #S K"],
) -> Float[Array, "B S d"]:
    """R, a layer at a time: of the queries' own `tokens`, and of the `keys` they see."""

    @recompute
    def share(anchor: Array, tokens: Array, keys: Array, share: Array) -> Array:
        mixed = interaction(anchor, keys, visible) + tokens.astype(jnp.float32)
        return share[..., None] * mixed

    def body(total: Array, of_layer: tuple[Array, ...]) -> tuple[Array, None]:
        return total + share(anchor, *of_layer), None

    total, _ = jax.lax.scan(body, jnp.zeros(anchor.shape, jnp.float32), (tokens, keys, shares))
    return total.astype(anchor.dtype)


def interaction(
    anchor: Float[Array, "B S d"], keys: Float[Array, "B K d"], visible: Bool[Array, "#B #S K"]
) -> Float[Array, "B S d"]:
    """`A T` in float32."""
    scores = jnp.einsum("bsd,bkd->bsk", anchor, keys, preferred_element_type=jnp.float32)
    scores = jax.nn.relu(scores) * visible
    weights = scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), SMALLEST_SUM)
    return jnp.einsum("bsk,bkd->bsd", weights.astype(keys.dtype), keys, preferred_element_type=jnp.float32)


@functools.partial(jax.checkpoint, static_argnums=0)
def output(
    kind: Variant,
    own: Params,
    last: Float[Array, "B S D"],
    anchor: Float[Array, "B S d"],
    mixed: Float[Array, "B S d"],
) -> Float[Array, "B S D"]:
    """What the head reads, of R."""
    if kind.of_clip:
        return last + linear(own["up"], jax.nn.relu(mixed))
    project = own["project"]
    narrow = project["linear"]
    if kind.projection == "bottleneck":
        narrow, mixed = project["contract"], jax.nn.relu(linear(narrow, mixed))
    mixed = anchor + linear_norm(narrow, project["norm"], mixed, EPSILON)
    return linear(own["up"], jax.nn.relu(mixed) if kind.active else mixed)
