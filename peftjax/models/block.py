"""The transformer block of every family: a family is a choice of `BlockConfig`.

Of a block of width D, with q = N H and k = K H the widths of queries and of keys, and inner size F,
the backward pass keeps, per token and in the compute dtype, 2 D + 2 q + 2 k + F values (+ F when
gated): the inputs of both residual branches, query, key, value and the attention's result, and what
enters the activation. Norms, rotation, attention weights, activations, casts of weights and dropout
masks are made again from those. The inputs of the q, k and v kernels are one array, made again by the
norm before them. A post-norm block keeps 2 D more: its norms come after the branches; a sandwich keeps
2 D more, and norms of query and key q + k. Cross-attention adds D + 2 q per token and 2 k per token of
the encoder; `context["encoded"]` is kept once for all blocks, and so is `context["bias"]`.

With `config.residuals` a block keeps codes of a few bits instead and makes only attention again: see
`peftjax.models.coded`, and `pj.coded_residuals` for what is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.models.attention import Visibility, attend
from peftjax.models.block_config import BlockConfig
from peftjax.models.coded import attended, kept_as_codes, linear, norm, plain_value
from peftjax.models.feed_forward import FeedForward
from peftjax.models.layers import Context, Dropout, recompute, recompute_module
from peftjax.models.names import ATTENTION_RESULT, split_by_name
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

        def layer(width: int, bias: bool, inputs: int = config.width, factor: float = 1.0) -> nn.Module:
            return linear(config)(width, factor * config.deviation(inputs), dtype, bias=bias)

        if config.fused_qkv:
            self.qkv = layer((config.num_heads + 2 * config.kv_heads) * config.head_width, config.qkv_bias)
        else:
            # Scores that are not scaled begin as small as scaled ones.
            unscaled = config.scaled_init and config.query_scale == 1.0
            factor = config.head_width**-0.5 if unscaled else 1.0
            self.query = layer(config.num_heads * config.head_width, config.qkv_bias, factor=factor)
            self.key = layer(config.kv_heads * config.head_width, config.qkv_bias)
            self.value = layer(config.kv_heads * config.head_width, config.qkv_bias)
        mixed = config.num_heads * config.head_width
        self.output = layer(config.width, config.output_bias, mixed)
        if config.qk_norm:
            self.query_norm = norm(config, dtype)
            self.key_norm = norm(config, dtype)

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

        `context` holds `mask` [B, S]; optionally `segments` [B, S], `rotation`, `window`, `bias`
        [1, N, S, S] of the scores, and with two rotations also `local_rotation` and `local`, whether
        this layer reads that one. With `cache_index`, the slot of the first token, keys and values go
        through the collection "cache", and `mask` [B, T] tells which of its slots are tokens; see
        `_through_cache`. `prefix` is further keys and values that all tokens see (`attention.Prefix`), as
        they are: not normed, not rotated, in no slot of the cache.
        """
        config = self.config
        if config.qk_norm:
            query, key = plain_value(self.query_norm(query)), plain_value(self.key_norm(key))
        if "cache_index" in context:
            key, value = self._through_cache(_rotated(config, key, context), value, context)
        seen = {name: context[name] for name in SEEN if name in context}
        if config.attention_dropout > 0.0 and self.has_rng("dropout"):
            seen["dropout_key"] = self.make_rng("dropout")
        # Not among the arrays: where it is known while tracing, attention is cut to the keys seen from there.
        mixed = partial(_mixed, config, context.get("cache_index"))
        if config.residuals is None:
            result = recompute(mixed)(query, key, value, seen)
        else:
            result = attended(config.residuals, mixed, (query, key, value), seen)
        return checkpoint_name(result.reshape(*result.shape[:2], -1), ATTENTION_RESULT)

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


SEEN = ("mask", "segments", "bias", "prefix", "window", "rotation", "local_rotation", "local")
"""What attention reads of the context, beside the slot of the first token in a cache."""


def _mixed(
    config: BlockConfig,
    cache_index: int | Array | None,
    query: Array,
    key: Array,
    value: Array,
    context: Context,
) -> Array:
    """The values that every token sees, mixed [B, S, N, H]; with a cache, its keys are rotated already."""
    query, key, value = (x.reshape(*x.shape[:2], -1, config.head_width) for x in (query, key, value))
    offset = 0 if cache_index is None else cache_index
    return attend(
        _rotated(config, query, context),
        _rotated(config, key, context) if cache_index is None else key,
        value,
        mask=context.get("mask"),
        segments=context.get("segments"),
        visible=Visibility(config.causal, context.get("window", config.window), offset),
        bias=context.get("bias"),
        scale=config.query_scale,
        softcap=config.softcap,
        dropout=config.attention_dropout,
        dropout_key=context.get("dropout_key"),
        prefix=context.get("prefix"),
    )


def _rotated(config: BlockConfig, x: Array, context: Context) -> Array:
    return rotate(x, layer_rotation(context)) if config.rotary else x


class CrossAttention(Attention):
    """Attention of the stream's queries to keys and values of what is `encoded`."""

    def project(self, x: Float[Array, "B T D"], encoded: Float[Array, "B S D"]) -> tuple[Array, Array, Array]:
        """Query [B, T, N, H] of the branch's input, key and value [B, S, K, H] of `encoded`."""
        return tuple(
            layer(of).reshape(*of.shape[:-1], -1, self.config.head_width)
            for layer, of in ((self.query, x), (self.key, encoded), (self.value, encoded))
        )


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
        self.attention_norm = norm(config, dtype)
        if config.cross_attention:
            # There is no order between two sequences, and nothing to fuse of two inputs.
            apart = {"causal": False, "window": None, "rotary": False, "fused_qkv": False}
            self.cross_attention = CrossAttention(dataclasses.replace(config, **apart), dtype)
            self.cross_attention_norm = norm(config, dtype)
            self.cross_attention_dropout = Dropout(config.output_dropout)
        self.feed_forward = FeedForward(config, dtype)
        self.feed_forward_norm = norm(config, dtype)
        if config.norm_order == "sandwich":
            self.attention_post_norm = norm(config, dtype)
            if config.cross_attention:
                self.cross_attention_post_norm = norm(config, dtype)
            self.feed_forward_post_norm = norm(config, dtype)
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
        """What attention adds to the residual stream."""
        mixed = self.attention.mix(*self._by_tokens(_project, hidden), context)
        update = self.attention_dropout(self._by_tokens(_output, mixed))
        return plain_value(self.attention_post_norm(update)) if self._sandwich else update

    def attention_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream after attention: `hidden + update`, normed in a post-norm block."""
        return self.normalize_attention(hidden + update) if self._post else hidden + update

    def normalize_attention(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The norm of the attention branch."""
        return plain_value(self.attention_norm(x))

    def cross_attention_branch(
        self, hidden: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B T D"]:
        """What attention to `encoded` [B, S, D] adds, where `encoded_mask` [B, S] of the context is True.

        A `prefix` of the context given here is this branch's.
        """
        names = {"encoded_mask": "mask", "prefix": "prefix"}
        own = {ours: context[name] for name, ours in names.items() if name in context}
        mixed = self.cross_attention.mix(*_project_cross(self, hidden, context["encoded"]), own)
        update = self.cross_attention_dropout(self.cross_attention.output(self._entering(mixed)))
        return plain_value(self.cross_attention_post_norm(update)) if self._sandwich else update

    def cross_attention_join(
        self, hidden: Float[Array, "B T D"], update: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The stream after cross-attention: `hidden + update`, normed in a post-norm block."""
        return self.normalize_cross_attention(hidden + update) if self._post else hidden + update

    def normalize_cross_attention(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The norm of the cross-attention branch."""
        return plain_value(self.cross_attention_norm(x))

    def feed_forward_branch(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What the feed-forward adds to the residual stream."""
        update = self.feed_forward_dropout(_contract(self, *self._by_tokens(_expand, hidden)))
        return plain_value(self.feed_forward_post_norm(update)) if self._sandwich else update

    def feed_forward_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream after the feed-forward: `hidden + update`, normed in a post-norm block."""
        return self.normalize_feed_forward(hidden + update) if self._post else hidden + update

    def normalize_feed_forward(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The norm of the feed-forward branch."""
        return plain_value(self.feed_forward_norm(x))

    @property
    def _post(self) -> bool:
        return self.config.norm_order == "post"

    @property
    def _sandwich(self) -> bool:
        return self.config.norm_order == "sandwich"

    def _by_tokens(self, part: Callable[..., Any], x: Float[Array, "B S D"]) -> Any:
        """A part of the block that acts on each token by itself."""
        return split_by_name(self.config.offloaded_tokens, partial(part, self), x)

    def _entering(self, x: Float[Array, "B S D"], norm: nn.Module | None = None) -> Any:
        """What a linear layer takes of `x`, normed if there is a norm."""
        if norm is not None:
            return norm(x)
        return x if self.config.residuals is None else kept_as_codes(x, self.config.residuals)


def _recomputed(part: Callable[..., Any]) -> Callable[..., Any]:
    """Products are linear, so backward needs their inputs only: the norm (or activation) is made again.

    A block that keeps codes makes nothing again, since it does not keep what that would be made of.
    """
    again = recompute_module(part)
    return lambda block, *inputs: (again if block.config.residuals is None else part)(block, *inputs)


@_recomputed
def _project(block: Block, hidden: Array) -> tuple[Array, Array, Array]:
    return block.attention.project(block._entering(hidden, None if block._post else block.attention_norm))


def _output(block: Block, mixed: Array) -> Array:
    return block.attention.output(block._entering(mixed))


@_recomputed
def _project_cross(block: Block, hidden: Array, encoded: Array) -> tuple[Array, Array, Array]:
    norm = None if block._post else block.cross_attention_norm
    return block.cross_attention.project(block._entering(hidden, norm), encoded)


@_recomputed
def _expand(block: Block, hidden: Array) -> tuple[Array, ...]:
    return block.feed_forward.expand(
        block._entering(hidden, None if block._post else block.feed_forward_norm)
    )


@_recomputed
def _contract(block: Block, *inner: Array) -> Array:
    return block.feed_forward.contract(*inner)
