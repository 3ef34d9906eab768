"""A feed-forward of experts, of which a router gives each token some (Shazeer et al. 2017, arXiv 1701.06538).

    l = x W_router                     [.., E]
    c = softmax of l, at its k largest
    y = sum_e c_e E_e(x)               over those k;  E_e as in `FeedForward`

Pairs of a token and one of its experts are sorted by expert, so that a product with all experts is one
`ragged_product`: k rows a token, however many experts there are. `c` enters before the way down, which
keeps its gradient free of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from peftjax.backbone.block_config import BlockConfig, Experts
from peftjax.backbone.layers import ACTIVATIONS, Dropout, dense, recompute_module
from peftjax.kernels.ragged_product import ragged_product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which expert takes which token; n rows are the B S k pairs of a token and an expert of it.

    Attributes:
        coefficients: of each token's experts, the largest first.
        order: the rows' pairs, as they are numbered token by token.
        experts: the rows' experts, ascending.
        sizes: how many rows each expert has.
    """

    coefficients: Float[Array, "B S k"]
    order: Int[Array, " n"]
    experts: Int[Array, " n"]
    sizes: Int[Array, " E"]

    def rows(self, x: Float[Array, "B S D"]) -> Float[Array, "n D"]:
        """Each row's token."""
        each = jnp.broadcast_to(x[:, :, None], (*self.coefficients.shape, x.shape[-1]))
        return _permuted(each.reshape(-1, x.shape[-1]), self.order)

    def row_coefficients(self) -> Float[Array, "n 1"]:
        """Each row's coefficient."""
        return _permuted(self.coefficients.reshape(-1, 1), self.order)

    def tokens(self, rows: Float[Array, "n D"]) -> Float[Array, "B S D"]:
        """The sum of each token's rows."""
        pairs = _permuted(rows, jnp.argsort(self.order))
        return pairs.reshape(*self.coefficients.shape, rows.shape[-1]).sum(-2)


def _permuted(rows: Array, order: Int[Array, " n"]) -> Array:
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")


def routed(logits: Float[Array, "B S E"], experts: Experts, dtype: DTypeLike) -> Routing:
    """The `experts.chosen` experts with the largest logits, and the softmax there, in float32."""
    logits = logits.astype(jnp.float32)
    largest, numbers = jax.lax.top_k(logits, experts.chosen)
    beyond = largest if experts.normalized else logits
    coefficients = jnp.exp(largest - jax.nn.logsumexp(beyond, axis=-1, keepdims=True))
    flat = numbers.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=experts.count)
    return Routing(coefficients.astype(dtype), order, flat[order], sizes)


class ExpertLinear(nn.Module):
    """`s (x W_e + b_e)` of rows in the order of experts, with `kernel` [E, D, F] and `bias` [E, F]."""

    features: int
    experts: int
    init_std: float
    dtype: DTypeLike
    use_bias: bool

    @nn.compact
    def __call__(
        self, rows: Float[Array, "n D"], routing: Routing, scale: Float[Array, "n 1"] | None = None
    ) -> Float[Array, "n F"]:
        """The rows' results, in the compute dtype."""
        shape = (self.experts, rows.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, jnp.float32)
        rows = rows if scale is None else rows * scale
        y = ragged_product(rows, kernel.astype(self.dtype), routing.sizes)
        if self.use_bias:
            table = self.param("bias", nn.initializers.zeros, (self.experts, self.features), jnp.float32)
            bias = table.astype(self.dtype).at[routing.experts].get(mode="promise_in_bounds")
            y += bias if scale is None else bias * scale
        return y


RecomputedExpertLinear = recompute_module(ExpertLinear)


class ExpertLayers(nn.Module):
    """The layers of all experts: kernels `up`, `gate` [E, D, F] and `down` [E, F, D]."""

    config: BlockConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Name the layers."""
        config = self.config

        def layer(width: int, inputs: int = config.width) -> nn.Module:
            return RecomputedExpertLinear(
                width,
                config.experts.count,
                config.deviation(inputs),
                self.dtype,
                config.feed_forward_bias,
            )

        self.up = layer(config.inner_size)
        self.down = layer(config.width, config.inner_size)
        if config.gated:
            self.gate = layer(config.inner_size)

    def expand(self, rows: Float[Array, "n D"], routing: Routing) -> tuple[Float[Array, "n F"], ...]:
        """What enters the activation, as in `FeedForward`."""
        up = self.up(rows, routing)
        return (self.gate(rows, routing), up) if self.config.gated else (up,)

    def contract(self, inner: Float[Array, "n F"], routing: Routing) -> Float[Array, "n D"]:
        """The way down, times the rows' coefficients."""
        return self.down(inner, routing, routing.row_coefficients())


class RoutedFeedForward(nn.Module):
    """A `router` with kernel [D, E], and `experts`."""

    config: BlockConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Name the layers."""
        config, experts = self.config, self.config.experts
        self.router = dense(
            experts.count, config.deviation(config.width), self.dtype, bias=experts.router_bias
        )
        self.experts = ExpertLayers(config, self.dtype)
        self.dropout = Dropout(config.inner_dropout)

    def route(self, x: Float[Array, "B S D"]) -> Float[Array, "B S E"]:
        """The router's logits."""
        return self.router(x)

    def expand(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "n F"] | Routing, ...]:
        """What enters the activation, a row for each expert of each token, and the routing."""
        routing = routed(self.route(x), self.config.experts, self.dtype)
        return (*self.experts.expand(routing.rows(x), routing), routing)

    def activate(self, *inner: Float[Array, "n F"] | Routing) -> tuple[Float[Array, "n F"], Routing]:
        """What enters the way down."""
        *inner, routing = inner
        return self.dropout(_activated(self.config, *inner)), routing

    def down(self, entering: tuple[Float[Array, "n F"], Routing]) -> Float[Array, "B S D"]:
        """The way down and the sum over a token's experts."""
        rows, routing = entering
        return routing.tokens(self.experts.contract(rows, routing))


def _activated(config: BlockConfig, first: Array, up: Array | None = None) -> Array:
    """`f(x)`, or gated: `f(gate) up`; with a bound c `f(min(gate, c)) (1 + up)`, up in [-c, c]."""
    f, bound = ACTIVATIONS[config.activation], config.experts.bound
    if up is None:
        return f(first)
    if bound is None:
        return f(first) * up
    return f(jnp.minimum(first, bound)) * (1 + jnp.clip(up, -bound, bound))
