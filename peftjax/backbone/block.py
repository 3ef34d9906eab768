"""The transformer block of every family: a family is a choice of `BlockConfig`.

Of a block of width D, with q = N H and k = K H the widths of queries and of keys, and inner size F,
the backward pass keeps, per token and in the compute dtype, 2 D + 2 q + 2 k + F values (+ F when
gated): the inputs of both residual branches, query, key, value and the attention's result, and what
enters the activation. Norms, rotation, attention weights, activations, casts of weights and dropout
masks are recomputed from those. The inputs of the q, k and v kernels are one array, recomputed by the
norm before them. A post-norm block keeps 2 D more: its norms come after the branches; a sandwich keeps
2 D more, and norms of query and key q + k. Cross-attention adds D + 2 q per token and 2 k per token of
the encoder; `Context.encoded` is kept once for all blocks, and so is `Context.bias`.

Of experts, F is k times that of one, and the sorted tokens are recomputed.

With `config.residuals` a block keeps codes of a few bits instead and recomputes only attention: see
`peftjax.backbone.coded_layers`, and `pj.coded_residuals` for what is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.backbone.attention_layer import Attention, CrossAttention
from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.coded_layers import kept_as_codes, norm, plain_value
from peftjax.backbone.context import Context
from peftjax.backbone.experts import RoutedFeedForward
from peftjax.backbone.feed_forward import FeedForward
from peftjax.backbone.layers import Dropout, recompute_module
from peftjax.backbone.on_mesh import token_devices
from peftjax.backbone.protocols import Sublayers
from peftjax.backbone.remat import split_by_name
from peftjax.backbone.rounding import RoundedActivations
from peftjax.backbone.tiles import in_tiles


class Block(Sublayers, nn.Module):
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
        feed_forward = FeedForward if config.experts is None else RoutedFeedForward
        self.feed_forward = feed_forward(config, dtype)
        self.feed_forward_norm = norm(config, dtype)
        if config.norm_order == "sandwich":
            self.attention_post_norm = norm(config, dtype)
            if config.cross_attention:
                self.cross_attention_post_norm = norm(config, dtype)
            self.feed_forward_post_norm = norm(config, dtype)
        if config.rounding is not None:
            self.rounding = RoundedActivations(config.rounding)
        self.attention_dropout = Dropout(config.output_dropout)
        self.feed_forward_dropout = Dropout(config.output_dropout)

    def attention_branch(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """What attention adds to the residual stream.

        With `context.attended`, the stream before this block, `hidden` [B, T, D] are queries beside its
        tokens: they read those, and neither are read nor read each other.
        """
        query, key, value = self._by_tokens(_project, hidden)
        if context.attended is not None:
            _, key, value = self._by_tokens(_project, context.attended)
        if self.config.rounding is not None and self.config.rounding.weight_bits is not None:
            context = self._with_rounded_weights(query, key, context)
        mixed = self.attention.mix(query, key, value, context)
        update = self.attention_dropout(self._by_tokens(_output, mixed))
        return plain_value(self.attention_post_norm(update)) if self._sandwich else update

    def _with_rounded_weights(self, query: Array, key: Array, context: Context) -> Context:
        """The context in which attention's weights are rounded; of a block that observes, as it is."""
        codes = self.rounding.attention_weights
        if not codes.rounding.observe:
            return dataclasses.replace(context, weight_codes=codes())
        codes.observe(self.attention.weights(query, key, context))
        return context

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
        """What attention to `context.encoded` adds; a prefix in a context given here is this branch's."""
        own = Context(mask=context.encoded_mask, prefix=context.prefix)
        mixed = self.cross_attention.mix(*_project_cross(self, hidden, context.encoded), own)
        update = self.cross_attention_dropout(self.cross_attention.output(self._entering(mixed, None)))
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
        tile, devices = self.config.feed_forward_tile, token_devices(hidden, self.config.mesh)
        if tile is not None and tile * devices < hidden.shape[1] and not self.is_initializing():
            return in_tiles(_tile_of_feed_forward, self, hidden, tile, devices)
        if self.config.experts is not None:
            # Rows in the order of experts do not join: each share of the tokens is finished by itself.
            return self._by_tokens(_expand, hidden, self._fed_forward)
        return self._fed_forward(self._by_tokens(_expand, hidden))

    def router_logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S E"]:
        """The logits by which the feed-forward's experts are chosen, of the stream that enters it."""
        return self.feed_forward.route(hidden if self._post else self.normalize_feed_forward(hidden))

    def _fed_forward(self, inner: tuple[Any, ...]) -> Array:
        update = self.feed_forward_dropout(_contract(self, *inner))
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

    def _by_tokens(
        self, part: Callable[..., Any], x: Float[Array, "B S D"], *then: Callable[[Any], Any]
    ) -> Any:
        """A part of the block that acts on each token by itself."""
        return split_by_name(self.config.offloaded_tokens, partial(part, self), x, *then)

    def _entering(self, x: Float[Array, "B S D"], name: str | None, norm: nn.Module | None = None) -> Any:
        """What a linear layer takes of `x`, normed if there is a norm, and rounded if it has a name."""
        entering = x if norm is None else norm(x)
        if self.config.rounding is not None and name is not None:
            return getattr(self.rounding, name)(entering)
        if norm is not None or self.config.residuals is None:
            return entering
        return kept_as_codes(x, self.config.residuals)


def _recomputed(part: Callable[..., Any]) -> Callable[..., Any]:
    """Products are linear, so backward needs their inputs only: the norm (or activation) is recomputed.

    A block that keeps codes recomputes nothing: it does not keep the inputs that this would need.
    """
    recomputed = recompute_module(part)
    return lambda block, *inputs: (recomputed if block.config.residuals is None else part)(block, *inputs)


@_recomputed
def _project(block: Block, hidden: Array) -> tuple[Array, Array, Array]:
    norm = None if block._post else block.attention_norm
    return block.attention.project(block._entering(hidden, "attention", norm))


def _output(block: Block, mixed: Array) -> Array:
    # Of what rounding gives nothing is kept: it is recomputed, as norms are.
    part = _of_mixed if block.config.rounding is None else recompute_module(_of_mixed)
    return part(block, mixed)


def _of_mixed(block: Block, mixed: Array) -> Array:
    return block.attention.output(block._entering(mixed, "attention_output"))


@_recomputed
def _project_cross(block: Block, hidden: Array, encoded: Array) -> tuple[Array, Array, Array]:
    norm = None if block._post else block.cross_attention_norm
    return block.cross_attention.project(block._entering(hidden, None, norm), encoded)


@_recomputed
def _expand(block: Block, hidden: Array) -> tuple[Any, ...]:
    norm = None if block._post else block.feed_forward_norm
    return block.feed_forward.expand(block._entering(hidden, "feed_forward", norm))


def _tile_of_feed_forward(block: Block, hidden: Array) -> Array:
    return block._fed_forward(_expand(block, hidden))


@_recomputed
def _contract(block: Block, *inner: Any) -> Array:
    inner, direct = (inner[:-1], inner[-1:]) if block.config.direct else (inner, ())
    entering = block.feed_forward.activate(*inner)
    if block.config.rounding is not None:
        entering = block.rounding.feed_forward_output(entering)
    return sum(direct, block.feed_forward.down(entering))
