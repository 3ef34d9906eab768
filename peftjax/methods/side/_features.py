"""What methods beside a frozen backbone share: the states of every layer, and the layers that read them.

Nothing of a backbone's layers is kept for the backward pass here but the states themselves. Trained
parameters are float32 and cast to the dtype of what they meet.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from peftjax.backbone.context import Context

Part = Mapping[str, Array]
# In a scan only, whose forward and backward loops share no subexpression; elsewhere the compiler would keep
# what `jax.checkpoint` without its barriers means to make again.
recompute = functools.partial(jax.checkpoint, prevent_cse=False)


def detached(tree: Any) -> Any:
    """The tree without gradients."""
    return jax.tree.map(jax.lax.stop_gradient, tree)


def states_of(
    model: Any,
    params: Any,
    hidden: Float[Array, "B S D"],
    context: Context,
    key: Key[Array, ""] | None,
    *,
    run_last: bool = True,
) -> tuple[Float[Array, "B S D"], Float[Array, "L B S D"]]:
    """The state after the last layer and those before every layer, H_L and H_0 ... H_{L-1}, detached.

    Without `run_last` the last layer is not computed, and the first result is H_{L-1}.
    """
    last = model.num_layers - 1

    def body(hidden: Array, layer: Any) -> tuple[Array, Array]:
        def run(hidden: Array) -> Array:
            return detached(model.run_layer(layer, hidden, context))

        # A slice without the last layer would be a copy of all other layers' weights.
        after = run(hidden) if run_last else jax.lax.cond(layer.own["layer"] < last, run, _same, hidden)
        return after, hidden

    layers = detached(model.layers(params, key))
    return jax.lax.scan(body, detached(hidden), layers, length=model.num_layers, unroll=model.unroll)


def states_of_cached(
    model: Any, params: Any, hidden: Float[Array, "B S D"], context: Context, cache: Any
) -> tuple[Float[Array, "B S D"], Any, Float[Array, "L B S D"]]:
    """`states_of` for further tokens, with the blocks' cache in the middle."""

    def body(carry: tuple[Array, Any], layer: Any) -> tuple[tuple[Array, Any], Array]:
        hidden, cache = carry
        return model.run_layer_cached(layer, hidden, context, cache), hidden

    layers, length = model.layers(params), model.num_layers
    (hidden, cache), states = jax.lax.scan(body, (hidden, cache), layers, length=length, unroll=model.unroll)
    return hidden, cache, states


def visible_tokens(model: Any, context: Context, queries: int, keys: int) -> Bool[Array, "#B #Q K"]:
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


def linear_init(key: Key[Array, ""], stack: tuple[int, ...], inputs: int, outputs: int) -> dict[str, Array]:
    """`kernel` [*stack, inputs, outputs] and `bias`, from U(±1/√inputs) as in torch."""
    bound, (kernel_key, bias_key) = inputs**-0.5, jax.random.split(key)
    shape = (*stack, inputs, outputs)
    return {
        "kernel": jax.random.uniform(kernel_key, shape, minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, (*stack, outputs), minval=-bound, maxval=bound),
    }


def norm_init(stack: tuple[int, ...], width: int) -> dict[str, Array]:
    """`scale` one and `bias` zero."""
    return {"scale": jnp.ones((*stack, width)), "bias": jnp.zeros((*stack, width))}


def linear(part: Part, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    """`x W + b`."""
    return x @ part["kernel"].astype(x.dtype) + part["bias"].astype(x.dtype)


def linear_norm(part: Part, norm: Part, x: Float[Array, "... i"], epsilon: float) -> Float[Array, "... o"]:
    """`LN(x W + b)` over the last axis; all but the product in float32."""
    wide = (x @ part["kernel"].astype(x.dtype)).astype(jnp.float32) + part["bias"]
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    return (wide * norm["scale"] + norm["bias"]).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=1)
def unit(x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... d"]:
    """`x / max(|x|, epsilon)` over the last axis in float32; its gradient at zero is finite."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.maximum(jnp.square(wide).sum(axis=-1, keepdims=True), epsilon**2))


def drop(x: Array, key: Key[Array, ""] | None, rate: float) -> Array:
    """Dropout when there is a key; the backward pass draws the mask again."""
    if key is None or not rate:
        return x

    @jax.checkpoint
    def masked(key: Key[Array, ""], x: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0)

    return masked(key, x)


def _same(hidden: Array) -> Array:
    return hidden
