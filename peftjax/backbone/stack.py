"""How a backbone runs its stacked blocks: one scan, or what a method puts in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from peftjax.backbone.context import Context

if TYPE_CHECKING:
    from peftjax.backbone.backbone import Backbone

Params = dict[str, Any]
Cache = Any
"""Keys and values of the tokens so far, as the stack that made it lays them out; of `Scan`, leaves
[num_layers, B, ...] by the names of a block's parts."""
DropoutKey = Key[Array, ""] | None


class Stack(Protocol):
    """Runs the blocks of a backbone, whose `layers` and `run_layer` it is written with.

    What `run` and `run_cached` return besides the cache goes to the backbone's head as `hidden`.
    """

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Any:
        """What the head reads; see `Backbone.run_blocks`."""

    def empty_cache(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> Cache:
        """An empty cache; see `Backbone.empty_cache`."""

    def run_cached(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        cache: Cache,
    ) -> tuple[Any, Cache]:
        """`run` for further tokens, and the cache with them; see `Backbone.run_blocks_cached`."""


@dataclass(frozen=True)
class Scan:
    """One block after the other, as a scan under the backbone's `remat` policy."""

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Float[Array, "B S D"]:
        """The hidden states after the last block."""

        def body(hidden: Array, layer: Any) -> tuple[Array, None]:
            return model.run_layer(layer, hidden, context), None

        layers, length = model.layers(params, key), model.num_layers
        return jax.lax.scan(model.checkpointed(body), hidden, layers, length=length, unroll=model.unroll)[0]

    def empty_cache(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> Cache:
        """Zeros for the keys and values of every layer, in the compute dtype."""

        def first_layer(params: Params, hidden: Array, context: Context) -> Cache:
            first = jax.tree.map(lambda leaf: leaf[0], model.layers(params))
            return model.run_layer_cached(first, hidden, context, {})[1]

        one = jax.eval_shape(first_layer, params, hidden, context)
        return jax.tree.map(lambda leaf: jnp.zeros((model.num_layers, *leaf.shape[1:]), leaf.dtype), one)

    def run_cached(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        cache: Cache,
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """The scan carries the cache and each block writes its own slots: it is changed in place."""

        def body(carry: tuple[Array, Cache], layer: Any) -> tuple[Any, None]:
            hidden, cache = carry
            return model.run_layer_cached(layer, hidden, context, cache), None

        layers, length = model.layers(params), model.num_layers
        return jax.lax.scan(body, (hidden, cache), layers, length=length, unroll=model.unroll)[0]
