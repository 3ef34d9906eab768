"""The network of `unipt`, whose equations are there: functions of the states of a frozen backbone."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from peftjax.backbone.functional import Part, linear, linear_norm
from peftjax.backbone.layers import recompute
from peftjax.backbone.protocols import Params
from peftjax.methods.side._layer_states import mean_visible

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between the released task trees.

    Attributes:
        of_clip: T_l without a norm, aggregated with the last, an anchor of its own, of which every token has
            its own in the confidence, and H_L + R's way up.
        projection: what R goes through before Q is added; None adds no Q.
        active: whether a relu comes before the way up.
        smallest_sum: what a row of A is divided by at least.
    """

    of_clip: bool = False
    projection: Literal["linear", "bottleneck"] | None = "linear"
    active: bool = True
    smallest_sum: float = 1e-8


VARIANTS = {
    "vse": Variant(),
    "clip4clip": Variant(of_clip=True, projection=None, smallest_sum=1e-6),
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

    # A layer at a time, so that backward recomputes what one layer needs.
    tokens = jax.lax.map(lambda xs: narrow(*xs), (own["down"], own.get("down_norm"), states))
    of_last = narrow(own["last"], own.get("last_norm"), last)
    if not kind.of_clip:
        return of_last, tokens
    return narrow(own["anchor"], None, last), jnp.concatenate([tokens, of_last[None]])


def confidence(
    weights: Float[Array, " d"],
    anchors: Float[Array, "B A d"],
    tokens: Float[Array, "n B K d"],
    visible: Bool[Array, "#B #Q K"],
    *,
    own_anchor: bool = False,
) -> Float[Array, "n B #Q"]:
    """c: the shares of the layers, whose sum is 1.

    With `own_anchor` the anchors are those of the queries, [B, Q, d], and each has shares of its own instead
    of those of the mean anchor.
    """

    @recompute
    def score(weights: Array, anchors: Array, tokens: Array) -> Array:
        query = anchors.astype(jnp.float32) if own_anchor else mean_visible(visible, anchors)
        return (query * mean_visible(visible, tokens)) @ weights

    scores = jax.lax.map(lambda of_layer: score(weights, anchors, of_layer), tokens)
    return jax.nn.softmax(scores, axis=0)


def aggregate(
    anchor: Float[Array, "B S d"],
    tokens: Float[Array, "n B S d"],
    keys: Float[Array, "n B K d"],
    shares: Float[Array, "n B #S"],
    visible: Bool[Array, "#B #S K"],
    smallest_sum: float,
) -> Float[Array, "B S d"]:
    """R, a layer at a time: of the queries' own `tokens`, and of the `keys` they see."""

    @recompute
    def share(anchor: Array, tokens: Array, keys: Array, share: Array) -> Array:
        mixed = interaction(anchor, keys, visible, smallest_sum) + tokens.astype(jnp.float32)
        return share[..., None] * mixed

    def body(total: Array, of_layer: tuple[Array, ...]) -> tuple[Array, None]:
        return total + share(anchor, *of_layer), None

    total, _ = jax.lax.scan(body, jnp.zeros(anchor.shape, jnp.float32), (tokens, keys, shares))
    return total.astype(anchor.dtype)


def interaction(
    anchor: Float[Array, "B S d"],
    keys: Float[Array, "B K d"],
    visible: Bool[Array, "#B #S K"],
    smallest_sum: float = Variant.smallest_sum,
) -> Float[Array, "B S d"]:
    """`A T` in float32."""
    scores = jnp.einsum("bsd,bkd->bsk", anchor, keys, preferred_element_type=jnp.float32)
    scores = jax.nn.relu(scores) * visible
    weights = scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), smallest_sum)
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
