"""Layers shared by the model families: dense, norm, dropout, attention, feed-forward, the block.

Weights reach plain `dot_general` and `gather` equations only, after a cast to the compute dtype, so
any of them may be replaced by a structured weight. Of a block of width D and inner size 4 D the
backward pass keeps 12 values per token and unit of width, all in the compute dtype: the inputs of
the two branches (2), of the two norms (2) and of the output kernel (1), query, key and value (3),
and the activation's input (4). Norms, activations, casts of weights, attention weights and dropout
masks are recomputed from those (`jax.checkpoint` around each), which costs element-wise passes and,
for attention, one more `Q K^T`. A frozen kernel's input is not kept either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

Context = dict[str, Array]
"""What `embed` hands to every block and to the head: `mask` [B, S] bool, True where a token is."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Activations by their Hugging Face `hidden_act` name; `gelu` is the exact one (erf)."""

# Blocks run inside a scan, whose forward and backward loops cannot share subexpressions, so the
# barriers of `prevent_cse` would only cost fusion.
recompute = partial(jax.checkpoint, prevent_cse=False)
recompute_module = partial(nn.remat, prevent_cse=False)
RecomputedDense = recompute_module(nn.Dense)
RecomputedLayerNorm = recompute_module(nn.LayerNorm)


def dense(features: int, init_std: float, dtype: DTypeLike, name: str) -> nn.Module:
    """A linear layer `x W + b` with `kernel` [in, features] drawn from N(0, init_std^2).

    The backward pass keeps `x` and casts the stored kernel again; without the recompute, a scan
    would keep a second copy of every layer's kernel in `dtype`.
    """
    init = nn.initializers.normal(init_std)
    return RecomputedDense(features, dtype=dtype, kernel_init=init, name=name)


def layer_norm(epsilon: float, dtype: DTypeLike, name: str) -> nn.Module:
    """A layer norm over the last axis: statistics in float32, result and residual in `dtype`."""
    return RecomputedLayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def drop(x: Array, key: Key[Array, ""], rate: float) -> Array:
    """Zero entries of `x` with probability `rate` and scale the rest by `1 / (1 - rate)`.

    The backward pass keeps the key and draws the mask again.
    """

    @recompute
    def masked(key: Key[Array, ""], x: Array) -> Array:
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(keep, x / (1.0 - rate), 0)

    return masked(key, x)


class Dropout(nn.Module):
    """`drop` at `rate` when an rng named "dropout" is given to `apply`, else the identity."""

    rate: float

    def __call__(self, x: Array) -> Array:
        """Drop entries of `x`, any shape."""
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        return drop(x, self.make_rng("dropout"), self.rate)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "B S"],
) -> Float[Array, "B T N H"]:
    """`softmax(Q K^T / sqrt(H)) V` over the unmasked positions, the softmax in float32."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])


def attend_with_dropout(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "B S"],
    dropout_key: Key[Array, ""],
    *,
    rate: float,
) -> Float[Array, "B T N H"]:
    """`attend` with dropout on the attention weights, which the fused attention does not offer."""
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None, :], scores, 0.7 * jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(value.dtype), dropout_key, rate)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with query, key, value and output kernels [D, D]."""

    num_heads: int
    attention_dropout: float
    output_dropout: float
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """Attend over `context["mask"]` [B, S]; output dropout included."""
        width = hidden.shape[-1]

        def project(name: str) -> Float[Array, "B S N H"]:
            layer = dense(width, self.init_std, self.dtype, name)
            return layer(hidden).reshape(*hidden.shape[:-1], self.num_heads, -1)

        inputs = (project("query"), project("key"), project("value"), context["mask"])
        if self.attention_dropout > 0.0 and self.has_rng("dropout"):
            attend_dropped = partial(attend_with_dropout, rate=self.attention_dropout)
            mixed = recompute(attend_dropped)(*inputs, self.make_rng("dropout"))
        else:
            mixed = recompute(attend)(*inputs)
        output = dense(width, self.init_std, self.dtype, "output")
        return Dropout(self.output_dropout)(output(mixed.reshape(hidden.shape)))


class FeedForward(nn.Module):
    """`f(x W_up + b_up) W_down + b_down` with kernels `up` [D, F] and `down` [F, D]."""

    inner_size: int
    activation: str
    output_dropout: float
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Apply both layers; the backward pass keeps the activation's input, not its output."""
        activation = ACTIVATIONS[self.activation]
        up = dense(self.inner_size, self.init_std, self.dtype, "up")
        down = dense(hidden.shape[-1], self.init_std, self.dtype, "down")
        activate_down = recompute_module(lambda down, x: down(activation(x)))
        return Dropout(self.output_dropout)(activate_down(down, up(hidden)))


class PostNormBlock(nn.Module):
    """A post-norm transformer block: `x = norm(x + attention(x)); x = norm(x + feed_forward(x))`.

    Its parts are Linen methods, so a block transform can call them apart with
    `block.apply({"params": layer}, ..., method="attention_branch")` and needs no family's names:
    `x_branch` is what a residual branch adds to the stream, `x_join` puts it there, and
    `normalize_x` is the norm on its own, for x in `attention`, `feed_forward`.
    """

    num_heads: int
    inner_size: int
    activation: str
    norm_epsilon: float
    attention_dropout: float
    output_dropout: float
    init_std: float
    dtype: DTypeLike

    def setup(self) -> None:
        """Name the parameters `attention`, `attention_norm`, `feed_forward`, `..._norm`."""
        self.attention = Attention(
            num_heads=self.num_heads,
            attention_dropout=self.attention_dropout,
            output_dropout=self.output_dropout,
            init_std=self.init_std,
            dtype=self.dtype,
        )
        self.attention_norm = layer_norm(self.norm_epsilon, self.dtype, "attention_norm")
        self.feed_forward = FeedForward(
            inner_size=self.inner_size,
            activation=self.activation,
            output_dropout=self.output_dropout,
            init_std=self.init_std,
            dtype=self.dtype,
        )
        self.feed_forward_norm = layer_norm(self.norm_epsilon, self.dtype, "feed_forward_norm")

    def __call__(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """Run both residual branches."""
        hidden = self.attention_join(hidden, self.attention_branch(hidden, context))
        return self.feed_forward_join(hidden, self.feed_forward_branch(hidden))

    def attention_branch(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """What attention adds to the residual stream."""
        return self.attention(hidden, context)

    def attention_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream after attention: `norm(hidden + update)`."""
        return self.normalize_attention(hidden + update)

    def normalize_attention(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The norm of the attention branch."""
        return self.attention_norm(x)

    def feed_forward_branch(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What the feed-forward adds to the residual stream."""
        return self.feed_forward(hidden)

    def feed_forward_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream after the feed-forward: `norm(hidden + update)`."""
        return self.normalize_feed_forward(hidden + update)

    def normalize_feed_forward(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The norm of the feed-forward branch."""
        return self.feed_forward_norm(x)
