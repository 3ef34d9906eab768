"""Attention with its linear layers: what a block's branch runs between its norm and its output kernel."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from peftjax.backbone.attention import Prefix, Visibility, attend
from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.coded_layers import attended, linear, norm, plain_value
from peftjax.backbone.context import Context, Rotation
from peftjax.backbone.flash_attention import flash_attend, warn_of_rows
from peftjax.backbone.layers import recompute
from peftjax.backbone.on_mesh import features_on_mesh, heads_on_mesh, tokens_to_heads
from peftjax.backbone.remat import ATTENTION_RESULT
from peftjax.backbone.rope import layer_rotation, rotate


class Attention(nn.Module):
    """Multi-head attention with kernels `query` [D, N H], `key` and `value` [D, K H], `output` [N H, D].

    With `fused_qkv` the first three are one kernel `qkv`; with `sinks` there is a vector `sinks` [N].
    """

    config: BlockConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Name the layers."""
        config, dtype = self.config, self.dtype

        def layer(width: int, bias: bool, factor: float = 1.0) -> nn.Module:
            return linear(config)(width, factor * config.deviation(config.width), dtype, bias=bias)

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
        last = linear(config, last=True)
        self.output = last(config.width, config.deviation(mixed), dtype, bias=config.output_bias)
        if config.qk_norm:
            self.query_norm = norm(config, dtype)
            self.key_norm = norm(config, dtype)
        if config.sinks:
            self.sinks = self.param(
                "sinks", nn.initializers.normal(config.init_std), (config.num_heads,), jnp.float32
            )

    def project(self, x: Float[Array, "B S D"]) -> tuple[Array, Array, Array]:
        """Query [B, S, N, H], key and value [B, S, K, H] of the branch's input."""
        config = self.config
        if config.fused_qkv:
            heads = features_on_mesh(self.qkv(x).reshape(*x.shape[:-1], -1, config.head_width), config.mesh)
            return tuple(jnp.split(heads, (config.num_heads, config.num_heads + config.kv_heads), axis=-2))
        return tuple(
            features_on_mesh(layer(x).reshape(*x.shape[:-1], -1, config.head_width), config.mesh)
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

        With `context.attended` the query [B, T, N, H] is that of queries beside the S tokens. With
        `context.cache_index` keys and values go through the collection "cache": see `_through_cache`.
        """
        config = self.config
        if config.qk_norm:
            query, key = plain_value(self.query_norm(query)), plain_value(self.key_norm(key))
        if context.cache_index is not None:
            key, value = self._through_cache(_rotated(config, key, context), value, context)
        place = None if context.attended is None else _place_of_queries(context, *key.shape[:2])
        drops = config.attention_dropout > 0.0 and self.has_rng("dropout")
        seen = Context(**{name: getattr(context, name) for name in SEEN})
        sinks = self.sinks if config.sinks else None
        rest = seen, place, self.make_rng("dropout") if drops else None, sinks
        # Not among the arrays: where it is known while tracing, attention is cut to the keys seen from there.
        mixed = partial(_mixed, config, context.cache_index)
        if config.residuals is None:
            result = recompute(mixed)(query, key, value, *rest)
        else:
            result = attended(config.residuals, mixed, (query, key, value), rest)
        return checkpoint_name(result.reshape(*result.shape[:2], -1), ATTENTION_RESULT)

    def weights(
        self, query: Float[Array, "B S N H"], key: Float[Array, "B S K H"], context: Context
    ) -> Float[Array, "B S N S"]:
        """The weights that `mix` gives to every token's value, without dropout, cache and prefix."""
        config, length = self.config, key.shape[1]
        if config.qk_norm:
            query, key = plain_value(self.query_norm(query)), plain_value(self.key_norm(key))
        seen = Context(**{name: getattr(context, name) for name in SEEN if name != "prefix"})
        # Of values that are rows of the identity a weighted mean is the weights.
        each = jnp.broadcast_to(jnp.eye(length)[None, :, None], (*key.shape[:3], length))
        config = dataclasses.replace(config, attention="rows")
        return _mixed(config, None, query, key, each, seen, None, None, self.sinks if config.sinks else None)

    def _through_cache(
        self, key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], context: Context
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """All keys and values up to now, after writing the new ones from slot `cache_index` on.

        The cache holds `keys` and `values` [L, B, K, T, H] of all layers, of which this one's are at
        `context.layer`: written so, a loop over the layers changes one array in place. Heads come
        before slots because that is how attention reads them. A new cache has one layer.
        """
        assert context.mask is not None
        layer, index = 0 if context.layer is None else context.layer, context.cache_index
        batch, _, heads, width = key.shape
        shape = (1, batch, heads, context.mask.shape[1], width)
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


SEEN = ("mask", "segments", "bias", "prefix", "window", "rotation", "local_rotation", "local", "weight_codes")
"""What attention reads of the context, beside the slot of the first token in a cache."""


def _mixed(
    config: BlockConfig,
    cache_index: int | Array | None,
    query: Array,
    key: Array,
    value: Array,
    context: Context,
    place: Int[Array, " B"] | None,
    dropout_key: Key[Array, ""] | None,
    sinks: Float[Array, " N"] | None,
) -> Array:
    """The values that every token sees, mixed [B, S, N, H]; with a cache, its keys are rotated already.

    With `place` the queries are beside the tokens, each row's where its token of that number stands.
    """
    query, key = (x.reshape(*x.shape[:2], -1, config.head_width) for x in (query, key))
    value = value.reshape(*key.shape[:3], -1)
    start = 0 if cache_index is None else cache_index
    window = config.window if context.window is None else context.window
    visible = Visibility(config.causal, window, start)
    seen = {"mask": context.mask, "segments": context.segments}
    if place is not None:
        visible, seen = Visibility(), {"mask": _seen_by_queries(context, visible, place, key.shape[1])}
    scores = {"visible": visible, "scale": config.query_scale, "softcap": config.softcap, "sinks": sinks}
    query = _rotated(config, query, context, place)
    key = _rotated(config, key, context) if cache_index is None else key
    alone = place is None and cache_index is None
    if config.attention == "flash" and alone:
        reason = _no_kernel(config, context, visible, dropout_key)
        if reason is None:
            mixed = flash_attend(
                query, key, value, **seen, **scores, windows=config.windows, mesh=config.mesh
            )
            return features_on_mesh(mixed, config.mesh)
        warn_of_rows(reason)
    if place is None:
        scores["bias"] = context.bias
    prefix, moved = context.prefix, alone and tokens_to_heads(query.shape, config.mesh)
    if moved:
        heads = key.shape[2]
        query, key, value = heads_on_mesh(query, key, value, config.mesh)
        prefix = _repeated(prefix, heads, key.shape[2] // heads)
    mixed = attend(
        query,
        key,
        value,
        **seen,
        **scores,
        dropout=config.attention_dropout,
        dropout_key=dropout_key,
        prefix=prefix,
        codes=context.weight_codes,
    )
    return features_on_mesh(mixed, config.mesh) if moved else mixed


def _no_kernel(
    config: BlockConfig, context: Context, visible: Visibility, dropout_key: Key[Array, ""] | None
) -> str | None:
    """Why no platform's kernel computes a layer's attention; None where one may."""
    known = visible.window is None or isinstance(visible.window, int) or bool(config.windows)
    reasons = {
        "a bias is added to the scores": context.bias is not None,
        "a prefix lies before the keys": context.prefix is not None,
        "attention weights are rounded": context.weight_codes is not None,
        "attention weights are dropped out": dropout_key is not None,
        "a layer's window is known at run time only": not known,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _repeated(prefix: Prefix | None, heads: int, times: int) -> Prefix | None:
    """The prefix with every head of keys and values so many times."""
    if prefix is None or times == 1:
        return prefix

    def repeat(x: Float[Array, "P KH"]) -> Float[Array, "P kH"]:
        return jnp.repeat(x.reshape(len(x), heads, -1), times, axis=1).reshape(len(x), -1)

    return {**prefix, **{name: repeat(prefix[name]) for name in ("keys", "values")}}


def _rotated(config: BlockConfig, x: Array, context: Context, place: Array | None = None) -> Array:
    if not config.rotary:
        return x
    turn = layer_rotation(context)
    return rotate(x, turn if place is None else _rotation_of_queries(turn, place))


# Queries beside the tokens of a layer (`Context.attended`) read its keys and values, and no token reads them.
# They stand where the last token of their row is: they see what it sees (order, window and segment), and
# rotary positions turn them as it. In an encoder that is every token, wherever they stand.


def _place_of_queries(context: Context, batch: int, length: int) -> Int[Array, " B"]:
    """`last` of the context, else the last token by `mask`, else the last of all."""
    if context.last is not None:
        return context.last
    if context.mask is not None:
        return jnp.max(jnp.where(context.mask, jnp.arange(length), 0), axis=1)
    return jnp.full(batch, length - 1)


def _seen_by_queries(
    context: Context, visible: Visibility, place: Int[Array, " B"], length: int
) -> Bool[Array, "B S"] | None:
    """Which tokens the one at `place` sees; None is all."""
    conditions = [visible.allowed(place, jnp.arange(length)), context.mask]
    if context.segments is not None:
        own = jnp.take_along_axis(context.segments, place[:, None], axis=1)
        conditions.append(context.segments == own)
    given = [condition for condition in conditions if condition is not None]
    return None if not given else jnp.stack(jnp.broadcast_arrays(*given)).all(axis=0)


def _rotation_of_queries(rotation: Rotation, place: Int[Array, " B"]) -> Rotation:
    """The rotation [B, 1, h] of every row's token at `place`."""

    def at_place(part: Array) -> Array:
        rows = jnp.broadcast_to(part, (len(place), *part.shape[1:]))
        return jnp.take_along_axis(rows, place[:, None, None], axis=1)

    return jax.tree.map(at_place, rotation)
