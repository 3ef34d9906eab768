"""The blocks of a backbone as a reversible stack: two streams that MEFT's F and G couple."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.backbone.backbone import Backbone, Layer, Stack
from peftjax.backbone.context import Context
from peftjax.backbone.protocols import Cache, DropoutKey, Params
from peftjax.core.errors import PeftError
from peftjax.methods.bottleneck._bottleneck import BRANCHES, Bottleneck
from peftjax.ops.reversible import Coupling, Pair, inverse_errors, reversible

Part = Literal["block", "attention", "feed_forward", "adapter"]
"""What a branch is: a layer, one of its sublayers, or a bottleneck alone."""
ADAPTER = "adapter"


@dataclasses.dataclass(frozen=True)
class ReversibleStack:
    """Runs two streams, which start as the embeddings; the head reads their mean.

    The streams are float32, whatever the backbone computes in. Backward keeps the pairs of streams of
    `peftjax.ops.reversible` for the reversible layers, and for the others what the backbone's `remat` says.

    Attributes:
        name: the method's, under which a layer's parameters lie.
        f: F.
        g: G.
        coupling: of the streams.
        every: layers between two kept pairs; 0 keeps the last alone.
        adapter: the bottleneck, where F or G is a bottleneck alone.
        num_reversible: how many of the layers, from the lowest on; None is all.
        replaced: the stack it is used instead of, whose cache it uses.
    """

    name: str
    f: Part
    g: Part
    coupling: Coupling
    every: int
    adapter: Bottleneck | None
    num_reversible: int | None
    replaced: Stack

    @property
    def is_exact(self) -> bool:
        """Whether the inputs of no layer are made by an inverse."""
        return self.every == 1 or self.num_reversible == 0

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Float[Array, "B S D"]:
        """The mean of the streams after the last block."""
        pair = _both(hidden)
        lower, upper = self._halves(model, model.layers(params, key))
        f, g = (self.branch(model, part) for part in (self.f, self.g))
        if lower is not None:
            pair = reversible(f, g, pair, context, lower, self.coupling, every=self.every)
        if upper is not None:

            def body(pair: Pair, layer: Layer) -> tuple[Pair, None]:
                of_f, of_g = (lambda x, call=call: call(context, layer, x) for call in (f, g))
                return self.coupling.forward(of_f, of_g, pair), None

            pair = jax.lax.scan(model.checkpointed(body), pair, upper, unroll=model.unroll)[0]
        return _mean(pair, hidden)

    def reconstruction(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> Float[Array, " R"]:
        """The largest absolute error of each reversible layer's inputs as backward recomputes them."""
        lower, _ = self._halves(model, model.layers(params))
        if lower is None:
            return jnp.zeros(0)
        f, g = (self.branch(model, part) for part in (self.f, self.g))
        return inverse_errors(f, g, _both(hidden), context, lower, self.coupling, every=self.every)

    def _halves(self, model: Backbone, layers: Layer) -> tuple[Layer | None, Layer | None]:
        """The layers that are reversible and those that are not, None for no layer.

        All of one kind are not sliced: a slice is a copy of the parameters.
        """
        length = model.num_layers
        number = length if self.num_reversible is None else self.num_reversible
        if number > length:
            raise PeftError(f"{self.name}: num_reversible is {number}, but a stack has {length} layers")
        if number in (0, length):
            return (layers, None) if number else (None, layers)
        halves = slice(number), slice(number, None)
        return tuple(jax.tree.map(lambda leaf, part=part: leaf[part], layers) for part in halves)

    def branch(self, model: Backbone, part: Part) -> Callable[[Context, Layer, Array], Array]:
        """F or G as a function `(context, layer, x) -> update`, from float32 to float32."""

        def run(context: Context, layer: Layer, x: Array) -> Array:
            x = x.astype(model.dtype)
            out = (
                self._adapted(layer, x)
                if part == "adapter"
                else model.run_layer(layer, x, context, part=part)
            )
            return out.astype(jnp.float32)

        return run

    def empty_cache(self, model: Backbone, params: Params, hidden: Array, context: Context) -> Cache:
        """The cache of the replaced stack: keys and values are one stream's, F's or G's."""
        return self.replaced.empty_cache(model, params, hidden, context)

    def run_cached(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context, cache: Cache
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """As `run` for further tokens, each with both its streams; the cache is changed in place."""

        def body(carry: tuple[Pair, Cache], layer: Layer) -> tuple[Any, None]:
            pair, cache = carry

            def branch(part: Part) -> Callable[[Array], Array]:
                def run(x: Array) -> Array:
                    nonlocal cache
                    x = x.astype(model.dtype)
                    if part == "adapter":
                        return self._adapted(layer, x).astype(jnp.float32)
                    out, cache = model.run_layer_cached(layer, x, context, cache, part=part)
                    return out.astype(jnp.float32)

                return run

            pair = self.coupling.forward(branch(self.f), branch(self.g), pair)
            return (pair, cache), None

        start = (_both(hidden), cache)
        (pair, cache), _ = jax.lax.scan(body, start, model.layers(params), unroll=model.unroll)
        return _mean(pair, hidden), cache

    def _adapted(self, layer: Layer, x: Array) -> Array:
        own = layer.weights[self.name]
        # The adapters of the branches fold in smaller numbers.
        key = jax.random.fold_in(own["key"], len(BRANCHES)) if "key" in own else None
        return self.adapter.run(own[ADAPTER], x, key)


def _both(hidden: Array) -> Pair:
    wide = hidden.astype(jnp.float32)
    return wide, wide


def _mean(pair: Pair, like: Array) -> Array:
    return (0.5 * (pair[0] + pair[1])).astype(like.dtype)
