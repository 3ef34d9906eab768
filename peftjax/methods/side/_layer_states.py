"""What methods beside a frozen backbone share: the states of every layer, and the layers that read them.

Nothing of a backbone's layers is kept for the backward pass here but the states themselves. Trained
parameters are float32 and cast to the dtype of what they meet.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from peftjax.backbone.backbone import Backbone, Layer
from peftjax.backbone.context import Context
from peftjax.backbone.protocols import Cache, DropoutKey, Params


def detached(tree: Any) -> Any:
    """The tree without gradients."""
    return jax.tree.map(jax.lax.stop_gradient, tree)


def states_of(
    model: Backbone,
    params: Params,
    hidden: Float[Array, "B S D"],
    context: Context,
    key: DropoutKey,
    *,
    run_last: bool = True,
) -> tuple[Float[Array, "B S D"], Float[Array, "L B S D"]]:
    """The state after the last layer and those before every layer, H_L and H_0 ... H_{L-1}, detached.

    Without `run_last` the last layer is not computed, and the first result is H_{L-1}.
    """
    last = model.num_layers - 1

    def body(hidden: Array, layer: Layer) -> tuple[Array, Array]:
        def run(hidden: Array) -> Array:
            return detached(model.run_layer(layer, hidden, context))

        # A slice without the last layer would be a copy of all other layers' weights.
        after = run(hidden) if run_last else jax.lax.cond(layer.own["layer"] < last, run, _same, hidden)
        return after, hidden

    layers = detached(model.layers(params, key))
    return jax.lax.scan(body, detached(hidden), layers, length=model.num_layers, unroll=model.unroll)


def states_of_cached(
    model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context, cache: Cache
) -> tuple[Float[Array, "B S D"], Cache, Float[Array, "L B S D"]]:
    """`states_of` for further tokens, with the blocks' cache in the middle."""

    def body(carry: tuple[Array, Cache], layer: Layer) -> tuple[tuple[Array, Any], Array]:
        hidden, cache = carry
        return model.run_layer_cached(layer, hidden, context, cache), hidden

    layers, length = model.layers(params), model.num_layers
    (hidden, cache), states = jax.lax.scan(body, (hidden, cache), layers, length=length, unroll=model.unroll)
    return hidden, cache, states


def visible_tokens(model: Backbone, context: Context, queries: int, keys: int) -> Bool[Array, "#B #Q K"]:
    """Which tokens a token may read: those of the mask, of its segment and, in a decoder, not later.

    One row stands for all queries where they read the same. Windows of single layers do not count.
    """
    visible = jnp.ones((1, 1, keys), bool) if context.mask is None else context.mask[:, None]
    if model.block.config.causal:
        start = 0 if context.cache_index is None else context.cache_index
        places = start + jnp.arange(queries)
        visible = visible & (jnp.arange(keys) <= places[:, None])
    if context.segments is not None:
        visible = visible & (context.segments[:, :, None] == context.segments[:, None, :])
    return visible


def mean_visible(visible: Bool[Array, "#B #Q K"], x: Float[Array, "*n B K d"]) -> Float[Array, "*n B #Q d"]:
    """The mean over the visible tokens in float32; zero where there is none."""
    weights = visible.astype(jnp.float32) / jnp.maximum(visible.sum(axis=-1, keepdims=True), 1)
    weights = jnp.broadcast_to(weights, (x.shape[-3], *weights.shape[1:]))
    return jnp.einsum("bqk,...bkd->...bqd", weights, x.astype(jnp.float32))


@functools.partial(jax.checkpoint, static_argnums=1)
def unit(x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... d"]:
    """`x / max(|x|, epsilon)` over the last axis in float32; its gradient at zero is finite."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.maximum(jnp.square(wide).sum(axis=-1, keepdims=True), epsilon**2))


def _same(hidden: Array) -> Array:
    return hidden
