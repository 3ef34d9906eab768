"""The layers of a block that keeps codes of its residuals: linear layers, norms, and what lies between.

Parameters are named and shaped as in the plain layers, so that both blocks take the same tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.kernels.packed_residuals import coarse, decode, encode
from peftjax.models.block_config import BlockConfig
from peftjax.models.layers import ACTIVATIONS, over_tokens, recompute_module, rms_normalised
from peftjax.residuals.activation import GRIDS, activate, activate_gated
from peftjax.residuals.bits import Bits
from peftjax.residuals.linear import Input, product_at
from peftjax.residuals.norm import Norm, normalise, scaled, statistics


class Linear(nn.Module):
    """`x W + b` with `kernel` [D, F], whose gradient is taken at the input's stand-in where it has one."""

    features: int
    dtype: DTypeLike
    kernel_init: nn.initializers.Initializer
    use_bias: bool

    @nn.compact
    def __call__(self, x: Input | Float[Array, "... D"]) -> Float[Array, "... F"]:
        """The layer's result, in the compute dtype."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        kernel = kernel.astype(self.dtype)
        y = product_at(x, kernel, over_tokens) if isinstance(x, Input) else over_tokens(x, kernel)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y


CodedLinear = recompute_module(Linear)


def coded_linear(features: int, init_std: float, dtype: DTypeLike, *, bias: bool) -> nn.Module:
    """As `dense`; backward keeps of the input its stand-in's codes, where the weight's gradient needs any."""
    init = nn.initializers.normal(init_std)
    return CodedLinear(features, dtype=dtype, kernel_init=init, use_bias=bias)


@functools.cache
def norm_of(config: BlockConfig, dtype: DTypeLike) -> Norm:
    """What the norm of a family computes."""
    epsilon, centred = config.norm_epsilon, config.norm == "layer"
    if centred:
        layer = nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, parent=None)
        return Norm(functools.partial(_layer_normalised, layer), centred, epsilon, 0.0, dtype)
    offset = 1.0 if config.norm == "rms_plus_one" else 0.0
    plain = functools.partial(rms_normalised, epsilon, dtype, offset, not offset)
    return Norm(lambda x, scale, _: plain(x, scale), centred, epsilon, offset, dtype)


def _layer_normalised(layer: nn.LayerNorm, x: Array, scale: Array, bias: Array | None) -> Array:
    return layer.apply({"params": {"scale": scale, "bias": bias}}, x)


def coded_norm(config: BlockConfig, dtype: DTypeLike) -> CodedNorm:
    """As `make_norm`; backward keeps codes."""
    assert config.residuals is not None
    return CodedNorm(norm_of(config, dtype), config.residuals, config.norm == "layer")


class CodedNorm(nn.Module):
    """A norm that keeps codes of the normalised values.

    Attributes:
        norm: what it computes.
        bits: of the codes.
        with_bias: whether it has a bias.
    """

    norm: Norm
    bits: Bits
    with_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Input | Float[Array, "... D"]:
        """What the norm gives, to enter a linear layer."""
        start = nn.initializers.constant(1.0 - self.norm.offset)
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32)
        bias = None
        if self.with_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        bits, (unit, r) = self.bits, statistics(self.norm, x)
        of_norm, of_inputs = bits.norm, bits.inputs
        if 32 in (of_norm, of_inputs):
            own, entering = (encode(unit, n, group=bits.group) for n in (of_norm, of_inputs))
        else:
            both = encode(unit, max(of_norm, of_inputs), group=bits.group)
            own, entering = (coarse(both) if n == 4 else both for n in (of_norm, of_inputs))
        y = normalise(self.norm, x, scale, bias, own, r)
        return y if of_inputs == 32 else Input(y, Partial(Partial(scaled, self.norm), entering, scale, bias))


def plain_value(x: Input | Array) -> Array:
    """The array that enters a linear layer."""
    return x.value if isinstance(x, Input) else x


def kept_as_codes(x: Float[Array, "... D"], bits: Bits) -> Input | Float[Array, "... D"]:
    """`x` to enter a linear layer, which keeps codes of it if it keeps anything."""
    if bits.inputs == 32:
        return x
    return Input(x, Partial(decode, encode(jax.lax.stop_gradient(x), bits.inputs, group=bits.group)))


def active(name: str, bits: Bits, *inner: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """The activation called `name`, gated by the second array where there are two."""
    f: Callable[[Array], Array] = ACTIVATIONS[name]
    return activate_gated(*inner, f, bits) if len(inner) == 2 else activate(inner[0], f, GRIDS[name], bits)
