"""A feed-forward of experts, of which a router gives each token some (Shazeer et al. 2017, arXiv 1701.06538).

    l = x W_router                     [.., E]
    c = softmax of l, at its k largest
    y = sum_e c_e E_e(x)               over those k;  E_e as in `FeedForward`

Pairs of a token and one of its experts are sorted by expert (`peftjax.backbone.routing`), so that a product
with all experts is one `ragged_product`: k rows a token, however many experts there are. `c` enters before
the way down, which keeps its gradient free of a product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.layers import ACTIVATIONS, Dropout, dense, over_tokens, recompute_module
from peftjax.backbone.on_mesh import whole_on_mesh
from peftjax.backbone.routing import Routing, routed
from peftjax.kernels.ragged_product import ragged_product


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
        weights = [kernel.astype(self.dtype)]
        if self.use_bias:
            table = self.param("bias", nn.initializers.zeros, (self.experts, self.features), jnp.float32)
            weights.append(table.astype(self.dtype))
        return routing.by_row(_linear, rows, *(() if scale is None else (scale,)), weights=weights)


def _linear(rows: list[Array], weights: list[Array], experts: Array, sizes: Array) -> Array:
    x, *scale = rows
    kernel, *bias = weights
    y = ragged_product(x * scale[0] if scale else x, kernel, sizes)
    for table in bias:
        own = table.at[experts].get(mode="fill", fill_value=0)
        y += own * scale[0] if scale else own
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
        product = None if config.mesh is None else _product_on(config.mesh)
        deviation, bias = config.deviation(config.width), experts.router_bias
        self.router = dense(experts.count, deviation, self.dtype, bias=bias, product=product)
        self.experts = ExpertLayers(config, self.dtype)
        self.dropout = Dropout(config.inner_dropout)

    def route(self, x: Float[Array, "B S D"]) -> Float[Array, "B S E"]:
        """The router's logits."""
        return self.router(x)

    def expand(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "n F"] | Routing, ...]:
        """What enters the activation, a row for each expert of each token, and the routing."""
        routing = routed(self.route(x), self.config.experts, self.dtype, self.config.mesh)
        return (*self.experts.expand(routing.rows(x), routing), routing)

    def activate(self, *inner: Float[Array, "n F"] | Routing) -> tuple[Float[Array, "n F"], Routing]:
        """What enters the way down."""
        *inner, routing = inner
        return self.dropout(_activated(self.config, *inner)), routing

    def down(self, entering: tuple[Float[Array, "n F"], Routing]) -> Float[Array, "B S D"]:
        """The way down and the sum over a token's experts."""
        rows, routing = entering
        return routing.tokens(self.experts.contract(rows, routing))


@functools.cache
def _product_on(mesh: Mesh) -> Callable[..., Array]:
    """The router's: one function for all layers alike, as modules are compared by what they hold."""

    def product(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
        return over_tokens(x, whole_on_mesh(kernel, mesh), **options)

    return product


def _activated(config: BlockConfig, first: Array, up: Array | None = None) -> Array:
    """`f(x)`, or gated: `f(gate) up`; with a bound c `f(min(gate, c)) (1 + up)`, up in [-c, c]."""
    f, bound = ACTIVATIONS[config.activation], config.experts.bound
    if up is None:
        return f(first)
    if bound is None:
        return f(first) * up
    return f(jnp.minimum(first, bound)) * (1 + jnp.clip(up, -bound, bound))
