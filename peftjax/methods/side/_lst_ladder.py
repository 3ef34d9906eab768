"""The stack of `lst`: a backbone's blocks and the side network that reads them; with its embeddings and head.

The head is that of an encoder whose states come in pairs; the embeddings have a table of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peftjax.backbone.backbone import Backbone, Layer, Stack, dropout_rngs
from peftjax.backbone.context import Context
from peftjax.backbone.functional import linear
from peftjax.backbone.layers import recompute
from peftjax.backbone.protocols import Batch, DropoutKey, Params
from peftjax.backbone.rewritten import RewrittenBlock, RewrittenModule
from peftjax.core.errors import PeftError
from peftjax.methods.side._lst_pruning import kept_count
from peftjax.methods.side._lst_start import used_layers


class States(NamedTuple):
    """What an encoder with a side network gives a decoder that has one."""

    backbone: Float[Array, "B S D"]
    side: Float[Array, "B S d"]


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Runs the backbone's blocks, and beside them those of the side network, `params[name]`.

    First the backbone as far as it is read, its states after every used layer set aside; then the side
    network over those. The two are apart so that any set of layers is two scans, and so that a step of
    the backbone is a program without anything trained in it.

    Attributes:
        name: of the method.
        plain: the stack that this one replaces.
        reduction: r.
        side_layers: the layers that are read; None is all.
        gated: whether a trained gate weighs the stream and what comes from the backbone, or they are added.
        temperature: T of the gates.
        merge_last: whether the backbone's last states are mixed into the outputs.
        backbone_dropout: whether the backbone drops out while it is trained.
        encodes: whether it is the stack of an encoder that a decoder reads.
    """

    name: str
    plain: Stack
    reduction: int
    side_layers: Sequence[int] | None
    gated: bool
    temperature: float
    merge_last: bool
    backbone_dropout: bool
    encodes: bool = False

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Any:
        """What the head reads [B, S, D]; of an encoder that a decoder reads, the last states of both."""
        side, side_params = self.side_of(model, params)
        key, side_key, end_key = (None, None, None) if key is None else jax.random.split(key, 3)
        context, side_context = self._contexts(context)
        backbone_key = key if self.backbone_dropout else None
        first = jax.lax.stop_gradient(hidden)

        def read(layer: Layer, hidden: Array, state: None) -> tuple[Array, None]:
            return model.run_layer(layer, hidden, context), state

        last, kept, _ = self._read(model, params, first, backbone_key, read, None)

        def body(stream: Array, rung: tuple[Any, ...]) -> tuple[Array, None]:
            layer, *joint = rung
            return side.run_layer(layer, self._join(stream, *joint), side_context), None

        rungs = self._rungs(side, side_params, kept, side_key)
        stream = _linear(side_params["first"], first)
        stream = jax.lax.scan(side.checkpointed(body), stream, rungs, unroll=model.unroll)[0]
        return self._end(side, side_params, stream, last, end_key)

    def empty_cache(self, model: Backbone, params: Params, hidden: Array, context: Context) -> Params:
        """The caches of the backbone and of the side network."""
        side, side_params = self.side_of(model, params)
        context, side_context = self._contexts(context)
        shorter = dataclasses.replace(model, num_layers=self._depth(model))
        stream = jax.eval_shape(_linear, side_params["first"], hidden)
        stream = jnp.zeros(stream.shape, stream.dtype)
        return {
            "backbone": self.plain.empty_cache(shorter, params, hidden, context),
            "side": self.plain.empty_cache(side, {"blocks": side_params["layers"]}, stream, side_context),
        }

    def run_cached(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context, cache: Params
    ) -> tuple[Any, Params]:
        """`run` for further tokens, and the two caches with them."""
        side, side_params = self.side_of(model, params)
        context, side_context = self._contexts(context)

        def read(layer: Layer, hidden: Array, cache: Any) -> tuple[Array, Any]:
            return model.run_layer_cached(layer, hidden, context, cache)

        last, kept, backbone = self._read(model, params, hidden, None, read, cache["backbone"])

        def body(carry: tuple[Array, Any], rung: tuple[Any, ...]) -> tuple[Any, None]:
            (stream, cache), (layer, *joint) = carry, rung
            return side.run_layer_cached(layer, self._join(stream, *joint), side_context, cache), None

        rungs = self._rungs(side, side_params, kept, None)
        carry = _linear(side_params["first"], hidden), cache["side"]
        (stream, of_side), _ = jax.lax.scan(body, carry, rungs, unroll=model.unroll)
        outputs = self._end(side, side_params, stream, last, None)
        return outputs, {"backbone": backbone, "side": of_side}

    def side_of(self, model: Backbone, params: Params) -> tuple[Backbone, Params]:
        """The side network as a backbone of its own, whose blocks are the model's but for their sizes.

        Raises:
            PeftError: another method changes the blocks; the family is not one of those it knows.
        """
        if isinstance(model.block, RewrittenBlock):
            raise PeftError(
                f"chain: {model.block.added_as!r} changes the blocks of the backbone, which no gradient "
                f"reaches beside the side network of {self.name!r}; leave one of the two out"
            )
        own, config, used = params[self.name], model.block.config, self._used(model)
        if (config.norm_order == "post") != ("norm" not in own):
            raise PeftError(
                f"{self.name}: blocks of norm order {config.norm_order!r} and a head "
                f"{'with' if 'norm' in own else 'without'} a norm are not one of the families it knows"
            )
        smaller = dataclasses.replace(
            config,
            width=own["first"]["bias"].shape[0],
            head_dim=kept_count(config.head_width, self.reduction),
            inner_size=kept_count(config.inner_size, self.reduction),
        )
        rows = np.asarray(used)
        side = dataclasses.replace(
            model,
            block=model.block.clone(config=smaller),
            num_layers=len(used),
            per_layer={name: np.asarray(values)[rows] for name, values in model.per_layer.items()},
            stack=self.plain,
            encoder=None,
        )
        return side, own

    def _used(self, model: Backbone) -> tuple[int, ...]:
        return used_layers(self.name, self.side_layers, model.num_layers)

    def _depth(self, model: Backbone) -> int:
        """How many layers of the backbone are run: none whose states are not read."""
        whole = self.encodes or self.merge_last
        return model.num_layers if whole else self._used(model)[-1] + 1

    def _contexts(self, context: Context) -> tuple[Context, Context]:
        """The contexts of the backbone's blocks and of the side network's."""
        context, bias = dataclasses.replace(context, side_bias=None), context.side_bias
        # Every r-th angle of a head is the angles of a head r times smaller.
        turns = context.rotation, context.local_rotation
        turns = jax.tree.map(lambda angles: angles[..., :: self.reduction], turns)
        side = dataclasses.replace(context, rotation=turns[0], local_rotation=turns[1])
        if bias is not None:
            side = dataclasses.replace(side, bias=bias)
        if isinstance(context.encoded, States):
            side = dataclasses.replace(side, encoded=context.encoded.side)
            context = dataclasses.replace(context, encoded=context.encoded.backbone)
        return context, side

    def _read(
        self, model: Backbone, params: Params, hidden: Array, key: DropoutKey, run: Any, state: Any
    ) -> tuple[Array, Float[Array, "n B S D"], Any]:
        """The backbone's last states, those after each used layer, and its state (a cache).

        A layer that is not read writes where the next one that is will write over it.
        """
        used, depth = self._used(model), self._depth(model)
        layers = model.layers(params, key)
        slots = jnp.asarray(np.searchsorted(used, np.arange(used[-1] + 1)))

        def body(carry: tuple[Any, ...], step: tuple[Any, Array]) -> tuple[Any, None]:
            (hidden, state, kept), (layer, slot) = carry, step
            hidden, state = run(layer, hidden, state)
            return (hidden, state, jax.lax.dynamic_update_index_in_dim(kept, hidden, slot, 0)), None

        def rest(carry: tuple[Any, Any], layer: Layer) -> tuple[Any, None]:
            return run(layer, *carry), None

        part = functools.partial(_rows, layers, model.num_layers)
        kept = jnp.zeros((len(used), *hidden.shape), hidden.dtype)
        carry = hidden, state, kept
        read = part(0, used[-1] + 1), slots
        (hidden, state, kept), _ = jax.lax.scan(body, carry, read, unroll=model.unroll)
        if depth > used[-1] + 1:
            unread = part(used[-1] + 1, depth)
            (hidden, state), _ = jax.lax.scan(rest, (hidden, state), unread, unroll=model.unroll)
        return jax.lax.stop_gradient(hidden), jax.lax.stop_gradient(kept), state

    def _rungs(self, side: Backbone, params: Params, kept: Array, key: DropoutKey) -> tuple[Any, ...]:
        """What differs between the layers of the side network."""
        layers = side.layers({"blocks": params["layers"]}, key)
        return layers, params["down"], kept, params.get("gate")

    def _join(
        self, stream: Float[Array, "B S d"], down: Params, feature: Float[Array, "B S D"], gate: Any
    ) -> Float[Array, "B S d"]:
        """The side stream mixed with the projected state of the backbone."""

        @recompute
        def joined(stream: Array, down: Params, feature: Array, gate: Any) -> Array:
            below = linear(down, feature)
            return stream + below if gate is None else self._mixed(gate, stream, below)

        return joined(stream, down, feature, gate)

    def _mixed(self, gate: Array, one: Array, other: Array) -> Array:
        share = jax.nn.sigmoid(gate / self.temperature).astype(one.dtype)
        return share * one + (1 - share) * other

    def _end(self, side: Backbone, params: Params, stream: Array, last: Array, key: DropoutKey) -> Any:
        if "norm" in params:
            variables = {"params": {"attention_norm": params["norm"]}}
            stream = side.block.apply(variables, stream, method="normalize_attention")
        if self.encodes:
            # What follows the norm in the head of the encoder.
            dropped = side.block.apply(
                {}, stream, method=lambda b, x: b.attention_dropout(x), rngs=dropout_rngs(key)
            )
            return States(last, dropped)
        up = _linear(params["up"], stream)
        return self._mixed(params["merge"], up, last) if self.merge_last else up


def _rows(layers: Layer, count: int, start: int, stop: int) -> Layer:
    """Layers [start, stop) of `count`."""
    if stop - start == count:
        return layers
    return jax.tree.map(lambda leaf: leaf[start:stop], layers)


# So that no copy of a kernel in another dtype is kept.
_linear = recompute(linear)


@dataclasses.dataclass(frozen=True)
class BothStates(RewrittenModule):
    """The head of an encoder whose last states come with those of its side network.

    Attributes:
        dropout: whether it drops out.
    """

    dropout: bool

    def apply(self, variables: Any, states: States, *inputs: Any, rngs: Any = None) -> States:
        """The backbone's states through the head, and the side network's as they are."""
        rngs = rngs if self.dropout else {}
        backbone = self.inner.apply(variables, states.backbone, *inputs, rngs=rngs)
        return states._replace(backbone=jax.lax.stop_gradient(backbone))


@dataclasses.dataclass(frozen=True)
class SideEmbed(RewrittenModule):
    """The embeddings of a backbone, and what the side network's blocks share of its own.

    That is a bias of relative positions by the table `params[name]`, which is read instead of the
    backbone's where both are computed by the one module. Compiled, the second lookup of words is none.

    Attributes:
        name: of the method.
        dropout: whether they drop out.
    """

    name: str
    dropout: bool

    def apply(self, variables: Any, batch: Batch, *, rngs: Any = None) -> Any:
        """As `apply` of a Linen module."""
        params = {name: own for name, own in variables["params"].items() if name != self.name}
        rngs = rngs if self.dropout else {}
        hidden, context = self.inner.apply({"params": params}, batch, rngs=rngs)
        if self.name in variables["params"]:
            own = {**params, **variables["params"][self.name]}
            again = self.inner.apply({"params": own}, batch)[1]
            context = dataclasses.replace(context, side_bias=again.bias)
        return hidden, context
