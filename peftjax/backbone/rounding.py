"""Activations of a block rounded to codes, as integer products would take them.

They are what enters its linear layers, `INPUTS`, and the weights of attention, `WEIGHTS`. What rounds them
are parameters of the block, `rounding/{name}/{scale, zero}`; an input without has a range for each token.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.backbone.layers import recompute
from peftjax.quantize.activations import LogSqrt2, Uniform, of_tokens

INPUTS = ("attention", "attention_output", "feed_forward", "feed_forward_output")
"""What enters query, key and value; attention's output layer; up and gate; down."""
WEIGHTS = "attention_weights"
"""What the softmax gives."""
OBSERVED = "observed"
"""The collection of activations that a block puts there where it observes."""


@dataclass(frozen=True)
class Rounding:
    """How a block rounds its activations.

    Attributes:
        bits: of what enters a linear layer.
        weight_bits: of attention's weights; None leaves them as they are.
        observe: put them into the collection `OBSERVED`, where that is mutable, and round nothing.
    """

    bits: int
    weight_bits: int | None
    observe: bool = False


class RoundedInput(nn.Module):
    """What enters a linear layer, rounded; backward recomputes it from the input."""

    rounding: Rounding

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Round to the codes of the parameters `scale` and, where there is one, `zero`, [] or [D] each.

        Without, each token's range is the share `share` of its largest size, by default all of it.
        """
        bits = self.rounding.bits
        if self.rounding.observe:
            self.sow(OBSERVED, "value", x)
            return x
        scale, zero, share = map(self._parameter, ("scale", "zero", "share"))
        if scale is not None:
            return recompute(Uniform.rounded)(Uniform(scale, zero, bits), x)
        share = 1.0 if share is None else share
        return recompute(lambda x, share: of_tokens(x, bits, share).rounded(x))(x, share)

    def _parameter(self, name: str) -> Array | None:
        return self.get_variable("params", name) if self.has_variable("params", name) else None


class AttentionWeightCodes(nn.Module):
    """What rounds attention's weights."""

    rounding: Rounding

    @nn.compact
    def __call__(self) -> LogSqrt2:
        """The codes of the parameter `scale`, or those of 1."""
        known = self.has_variable("params", "scale")
        scale = self.get_variable("params", "scale") if known else jnp.float32(1)
        assert self.rounding.weight_bits is not None
        return LogSqrt2(scale, self.rounding.weight_bits)

    def observe(self, weights: Float[Array, "B N T S"]) -> None:
        """Put weights where they are looked for."""
        self.sow(OBSERVED, "value", weights)


class RoundedActivations(nn.Module):
    """What rounds the activations of a block, by their names."""

    rounding: Rounding

    def setup(self) -> None:
        """Name the parameters."""
        self.attention = RoundedInput(self.rounding)
        self.attention_output = RoundedInput(self.rounding)
        self.feed_forward = RoundedInput(self.rounding)
        self.feed_forward_output = RoundedInput(self.rounding)
        self.attention_weights = AttentionWeightCodes(self.rounding)
