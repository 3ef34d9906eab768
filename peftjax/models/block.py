"""The transformer block of every family: a family is a choice of `BlockConfig`.

Of a block of width D, with q = N H and k = K H the widths of queries and of keys, and inner size F,
the backward pass keeps, per token and in the compute dtype, 2 D + 2 q + 2 k + F values (+ F when
gated): the inputs of both residual branches, query, key, value and the attention's result, and what
enters the activation. Norms, rotation, attention weights, activations, casts of weights and dropout
masks are made again from those. The inputs of the q, k and v kernels are one array, made again by the
norm before them. A post-norm block keeps 2 D more: its norms come after the branches; a sandwich keeps
2 D more, and norms of query and key q + k. Cross-attention adds D + 2 q per token and 2 k per token of
the encoder; `context["encoded"]` is kept once for all blocks, and so is `context["bias"]`.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.models.attention import Visibility, attend
from peftjax.models.block_config import BlockConfig, make_norm
from peftjax.models.layers import (
    ACTIVATIONS,
    Context,
    Dropout,
    dense,
    recompute,
    recompute_module,
)
from peftjax.models.queries import place_of_queries, rotation_of_queries, seen_by_queries
from peftjax.models.rope import layer_rotation, rotate


class Attention(nn.Module):
    """Multi-head attention with kernels `query` [D, N H], `key` and `value` [D, K H], `output` [N H, D].

    With `fused_qkv` the first three are one kernel `qkv`.
    """

    config: BlockConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Name the layers."""
        config, dtype = self.config, self.dtype

        def linear(width: int, bias: bool, inputs: int = config.width, factor: float = 1.0) -> nn.Module:
            return dense(width, factor * config.deviation(inputs), dtype, bias=bias)

        if config.fused_qkv:
            self.qkv = linear((config.num_heads + 2 * config.kv_heads) * config.head_width, config.qkv_bias)
        else:
            # Scores that are not scaled begin as small as scaled ones.
            unscaled = config.scaled_init and config.query_scale == 1.0
            factor = config.head_width**-0.5 if unscaled else 1.0
            self.query = linear(config.num_heads * config.head_width, config.qkv_bias, factor=factor)
            self.key = linear(config.kv_heads * config.head_width, config.qkv_bias)
            self.value = linear(config.kv_heads * config.head_width, config.qkv_bias)
        mixed = config.num_heads * config.head_width
        self.output = linear(config.width, config.output_bias, mixed)
        if config.qk_norm:
            self.query_norm = make_norm(config, dtype)
            self.key_norm = make_norm(config, dtype)

    def project(self, x: Float[Array, "B S D"]) -> tuple[Array, Array, Array]:
        """Query [B, S, N, H], key and value [B, S, K, H] of the branch's input."""
        config = self.config
        if config.fused_qkv:
            heads = self.qkv(x).reshape(*x.shape[:-1], -1, config.head_width)
            return tuple(jnp.split(heads, (config.num_heads, config.num_heads + config.kv_heads), axis=-2))
        return tuple(
            layer(x).reshape(*x.shape[:-1], -1, config.head_width)
            for layer in (self.query, self.key, self.value)
        )

    def mix(
        self,
        query: Float[Array, "B S N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        context: Context,
    ) -> Float[Array, "B S NH"]:
        """The values that every token sees, mixed; of earlier calls too where there is a cache.

        With `attended` in the context the query [B, T, N, H] is that of queries beside the S tokens.
        `context` holds `mask` [B, S]; optionally `segments` [B, S], `rotation`, `window`, `bias`
        [1, N, S, S] of the scores, and with two rotations also `local_rotation` and `local`, whether
        this layer reads that one. With `cache_index`, the slot of the first token, keys and values go
        through the collection "cache", and `mask` [B, T] tells which of its slots are tokens; see
        `_through_cache`.
        """
        config = self.config
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)

        offset = context.get("cache_index", 0)
        visible = Visibility(config.causal, context.get("window", config.window), offset)
        seen = {name: context[name] for name in ("mask", "segments", "bias") if name in context}
        place = None
        if "attended" in context:
            batch, length = key.shape[:2]
            place = place_of_queries(context, batch, length)
            visible, seen = Visibility(), {"mask": seen_by_queries(context, visible, place, length)}

        def rotated(x: Array, place: Array | None = None) -> Array:
            if not config.rotary:
                return x
            turn = layer_rotation(context)
            return rotate(x, turn if place is None else rotation_of_queries(turn, place))

        cached = "cache_index" in context
        if cached:
            key, value = self._through_cache(rotated(key), value, context)
        dropped = config.attention_dropout > 0.0 and self.has_rng("dropout")
        dropout_key = self.make_rng("dropout") if dropped else None

        @recompute
        def mixed(query: Array, key: Array, value: Array, context: Context) -> Array:
            return attend(
                rotated(query, place),
                key if cached else rotated(key),
                value,
                mask=context.get("mask"),
                segments=context.get("segments"),
                visible=visible,
                bias=context.get("bias"),
                scale=config.query_scale,
                softcap=config.softcap,
                dropout=config.attention_dropout,
                dropout_key=dropout_key,
            )

        result = mixed(query, key, value, seen)
        return result.reshape(*result.shape[:2], -1)

    def _through_cache(
        self, key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], context: Context
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """All keys and values up to now, after writing the new ones from slot `cache_index` on.

        The cache holds `keys` and `values` [L, B, K, T, H] of all layers, of which this one's are at
        `context["layer"]`: written so, a loop over the layers changes one array in place. Heads come
        before slots because that is how attention reads them. A new cache has one layer.
        """
        layer, index = context.get("layer", 0), context["cache_index"]
        batch, _, heads, width = key.shape
        shape = (1, batch, heads, context["mask"].shape[1], width)
        whole = []
        for name, new in (("keys", key), ("values", value)):
            if not self.has_variable("cache", name):
                self.put_variable("cache", name, jnp.zeros(shape, new.dtype))
            slots, rows = self.get_variable("cache", name), new.transpose(0, 2, 1, 3)[None]
            slots = jax.lax.dynamic_update_slice(slots, rows, (layer, 0, 0, index, 0))
            self.put_variable("cache", name, slots)
            own = jax.lax.dynamic_index_in_dim(slots, layer, keepdims=False)
            whole.append(own.transpose(0, 2, 1, 3))
        return whole[0], whole[1]


class CrossAttention(Attention):
    """Attention of the stream's queries to keys and values of what is `encoded`."""

    def project(self, x: Float[Array, "B T D"], encoded: Float[Array, "B S D"]) -> tuple[Array, Array, Array]:
        """Query [B, T, N, H] of the branch's input, key and value [B, S, K, H] of `encoded`."""
        return tuple(
            layer(of).reshape(*of.shape[:-1], -1, self.config.head_width)
            for layer, of in ((self.query, x), (self.key, encoded), (self.value, encoded))
        )


class FeedForward(nn.Module):
    """`f(x W_up) W_down`, or gated, with kernels `up`, `gate` [D, F] and `down` [F, D]."""

    config: BlockConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Name the layers."""
        config = self.config

        def linear(width: int, inputs: int = config.width) -> nn.Module:
            return dense(width, config.deviation(inputs), self.dtype, bias=config.feed_forward_bias)

        self.up = linear(config.inner_size)
        self.down = linear(config.width, config.inner_size)
        if config.gated:
            self.gate = linear(config.inner_size)
        self.dropout = Dropout(config.inner_dropout)

    def expand(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S F"], ...]:
        """What enters the activation: `x W_up`, before it `x W_gate` when gated."""
        return (self.gate(x), self.up(x)) if self.config.gated else (self.up(x),)

    def contract(self, *inner: Float[Array, "B S F"]) -> Float[Array, "B S D"]:
        """The activation and the way down."""
        active = ACTIVATIONS[self.config.activation](inner[0])
        return self.down(self.dropout(active * inner[1] if self.config.gated else active))


class Block(nn.Module):
    """A transformer block of two residual branches, or three with `cross_attention` between them.

    Its parts are Linen methods, so a block transform can call them apart with
    `block.apply({"params": layer}, ..., method="attention_branch")` and needs no family's names:
    `x_branch` is what a residual branch adds to the stream, `x_join` puts it there, and
    `normalize_x` is the norm on its own, for x in `attention`, `cross_attention`, `feed_forward`.
    """

    config: BlockConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Name the parameters `attention`, `attention_norm`, `feed_forward`, `feed_forward_norm`."""
        config, dtype = self.config, self.dtype
        self.attention = Attention(config, dtype)
        self.attention_norm = make_norm(config, dtype)
        if config.cross_attention:
            # There is no order between two sequences, and nothing to fuse of two inputs.
            apart = {"causal": False, "window": None, "rotary": False, "fused_qkv": False}
            self.cross_attention = CrossAttention(dataclasses.replace(config, **apart), dtype)
            self.cross_attention_norm = make_norm(config, dtype)
            self.cross_attention_dropout = Dropout(config.output_dropout)
        self.feed_forward = FeedForward(config, dtype)
        self.feed_forward_norm = make_norm(config, dtype)
        if config.norm_order == "sandwich":
            self.attention_post_norm = make_norm(config, dtype)
            if config.cross_attention:
                self.cross_attention_post_norm = make_norm(config, dtype)
            self.feed_forward_post_norm = make_norm(config, dtype)
        self.attention_dropout = Dropout(config.output_dropout)
        self.feed_forward_dropout = Dropout(config.output_dropout)

    def __call__(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """Run the residual branches."""
        return self.feed_forward_sublayer(self.attention_sublayer(hidden, context))

    def attention_sublayer(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """The stream after attention, and after cross-attention where there is one."""
        hidden = self.attention_join(hidden, self.attention_branch(hidden, context))
        if self.config.cross_attention:
            hidden = self.cross_attention_join(hidden, self.cross_attention_branch(hidden, context))
        return hidden

    def feed_forward_sublayer(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The stream after the feed-forward."""
        return self.feed_forward_join(hidden, self.feed_forward_branch(hidden))

    def attention_branch(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """What attention adds to the residual stream.

        With `attended` [B, S, D] in the context, the stream before this block, `hidden` [B, T, D] are queries
        beside its tokens: they read those, and neither are read nor read each other.
        """
        query, key, value = _project(self, hidden)
        if "attended" in context:
            _, key, value = _project(self, context["attended"])
        mixed = self.attention.mix(query, key, value, context)
        update = self.attention_dropout(self.attention.output(mixed))
        return self.attention_post_norm(update) if self._sandwich else update

    def attention_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream after attention: `hidden + update`, normed in a post-norm block."""
        return self.normalize_attention(hidden + update) if self._post else hidden + update

    def normalize_attention(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The norm of the attention branch."""
        return self.attention_norm(x)

    def cross_attention_branch(
        self, hidden: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B T D"]:
        """What attention to `encoded` [B, S, D] adds, where `encoded_mask` [B, S] of the context is True."""
        mixed = self.cross_attention.mix(
            *_project_cross(self, hidden, context["encoded"]),
            {"mask": context["encoded_mask"]} if "encoded_mask" in context else {},
        )
        update = self.cross_attention_dropout(self.cross_attention.output(mixed))
        return self.cross_attention_post_norm(update) if self._sandwich else update

    def cross_attention_join(
        self, hidden: Float[Array, "B T D"], update: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The stream after cross-attention: `hidden + update`, normed in a post-norm block."""
        return self.normalize_cross_attention(hidden + update) if self._post else hidden + update

    def normalize_cross_attention(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The norm of the cross-attention branch."""
        return self.cross_attention_norm(x)

    def feed_forward_branch(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What the feed-forward adds to the residual stream."""
        update = self.feed_forward_dropout(_contract(self, *_expand(self, hidden)))
        return self.feed_forward_post_norm(update) if self._sandwich else update

    def feed_forward_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream after the feed-forward: `hidden + update`, normed in a post-norm block."""
        return self.normalize_feed_forward(hidden + update) if self._post else hidden + update

    def normalize_feed_forward(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The norm of the feed-forward branch."""
        return self.feed_forward_norm(x)

    @property
    def _post(self) -> bool:
        return self.config.norm_order == "post"

    @property
    def _sandwich(self) -> bool:
        return self.config.norm_order == "sandwich"


# Products are linear, so the backward pass of these needs their inputs only: the norm (or activation)
# is made again, and no product is.


@recompute_module
def _project(block: Block, hidden: Array) -> tuple[Array, Array, Array]:
    return block.attention.project(hidden if block._post else block.attention_norm(hidden))


@recompute_module
def _project_cross(block: Block, hidden: Array, encoded: Array) -> tuple[Array, Array, Array]:
    return block.cross_attention.project(
        hidden if block._post else block.cross_attention_norm(hidden), encoded
    )


@recompute_module
def _expand(block: Block, hidden: Array) -> tuple[Array, ...]:
    return block.feed_forward.expand(hidden if block._post else block.feed_forward_norm(hidden))


@recompute_module
def _contract(block: Block, *inner: Array) -> Array:
    return block.feed_forward.contract(*inner)
