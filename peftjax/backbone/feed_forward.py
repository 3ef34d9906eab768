"""The feed-forward branch of a block."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.coded_layers import activated, linear
from peftjax.backbone.layers import ACTIVATIONS, Dropout
from peftjax.backbone.on_mesh import features_on_mesh
from peftjax.ops.coded.linear import Input


class FeedForward(nn.Module):
    """`f(x W_up) W_down`, or gated, with kernels `up`, `gate` [D, F] and `down` [F, D]."""

    config: BlockConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Name the layers."""
        config = self.config

        def layer(width: int, inputs: int = config.width, *, last: bool = False) -> nn.Module:
            deviation = config.deviation(inputs)
            return linear(config, last=last)(width, deviation, self.dtype, bias=config.feed_forward_bias)

        self.up = layer(config.inner_size)
        self.down = layer(config.width, config.inner_size, last=True)
        if config.gated:
            self.gate = layer(config.inner_size)
        if config.direct:
            self.direct = layer(config.width)
        if config.idle:
            self.idle = self.param("idle", nn.initializers.zeros, (config.inner_size,), bool)
        self.dropout = Dropout(config.inner_dropout)

    def expand(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S F"], ...]:
        """What enters the activation: `x W_up`, before it `x W_gate` when gated; and `x W_direct`, if any."""
        inner = (self.gate(x), self.up(x)) if self.config.gated else (self.up(x),)
        inner = tuple(features_on_mesh(one, self.config.mesh) for one in inner)
        return (*inner, self.direct(x)) if self.config.direct else inner

    def activate(self, *inner: Float[Array, "B S F"]) -> Input | Float[Array, "B S F"]:
        """What enters the way down."""
        config = self.config
        if config.residuals is not None:
            return activated(config, self.dropout, *inner)
        result = ACTIVATIONS[config.activation](inner[0])
        result = result * inner[1] if config.gated else result
        return self.dropout(jnp.where(self.idle, inner[-1], result) if config.idle else result)
