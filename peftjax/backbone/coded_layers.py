"""The layers of a block that keeps codes of its residuals: linear layers, norms, and what lies between.

Parameters are named and shaped as in the plain layers, so that both blocks take the same tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.backbone.block_config import BlockConfig, make_norm
from peftjax.backbone.column_product import column_product
from peftjax.backbone.layers import (
    ACTIVATIONS,
    Dropout,
    dense,
    over_tokens,
    recompute,
    recompute_module,
    rms_normalized,
)
from peftjax.backbone.on_mesh import kernel_on_mesh
from peftjax.ops.coded.activation import GRIDS, activate
from peftjax.ops.coded.bits import Bits
from peftjax.ops.coded.linear import Input, product_at
from peftjax.ops.coded.norm import Norm, normalize, scaled, statistics
from peftjax.ops.coded.recompute import recomputed_from_codes
from peftjax.quantize import Codes, decode
from peftjax.quantize.affine import encode


class Linear(nn.Module):
    """`x W + b` with `kernel` [D, F], whose gradient is taken at the input's stand-in where it has one."""

    features: int
    dtype: DTypeLike
    kernel_init: nn.initializers.Initializer
    use_bias: bool
    product: Callable[..., Array] = over_tokens

    @nn.compact
    def __call__(self, x: Input | Float[Array, "... D"]) -> Float[Array, "... F"]:
        """The layer's result, in the compute dtype."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        kernel = kernel.astype(self.dtype)
        y = product_at(x, kernel, self.product) if isinstance(x, Input) else self.product(x, kernel)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y


CodedLinear = recompute_module(Linear)


def coded_linear(
    features: int,
    init_std: float,
    dtype: DTypeLike,
    *,
    bias: bool,
    product: Callable[..., Array] = over_tokens,
) -> nn.Module:
    """As `dense`; backward keeps of the input its stand-in's codes, where the weight's gradient needs any."""
    init = nn.initializers.normal(init_std)
    return CodedLinear(features, dtype=dtype, kernel_init=init, use_bias=bias, product=product)


@functools.cache
def norm_of(config: BlockConfig, dtype: DTypeLike) -> Norm:
    """What the norm of a family computes."""
    epsilon, centered = config.norm_epsilon, config.norm == "layer"
    if centered:
        layer = nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, parent=None)
        return Norm(functools.partial(_layer_normalized, layer), centered, epsilon, 0.0, dtype)
    offset = 1.0 if config.norm == "rms_plus_one" else 0.0
    plain = functools.partial(rms_normalized, epsilon, dtype, offset, config.norm == "rms")
    return Norm(lambda x, scale, _: plain(x, scale), centered, epsilon, offset, dtype)


def _layer_normalized(layer: nn.LayerNorm, x: Array, scale: Array, bias: Array | None) -> Array:
    return layer.apply({"params": {"scale": scale, "bias": bias}}, x)


def coded_norm(config: BlockConfig, dtype: DTypeLike) -> CodedNorm:
    """As `make_norm`; backward keeps codes."""
    assert config.residuals is not None
    return CodedNorm(norm_of(config, dtype), config.residuals, config.norm == "layer")


class CodedNorm(nn.Module):
    """A norm that keeps codes of the normalized values.

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
        unit, r = statistics(self.norm, x)
        own, entering = self.bits.codes(unit, self.bits.norm)
        y = normalize(self.norm, x, scale, bias, own, r, entering)
        if self.bits.inputs == 32:
            return y
        return Input(y, Partial(functools.partial(scaled, self.norm), entering, scale, bias))


def linear(config: BlockConfig, *, last: bool = False) -> Callable[..., nn.Module]:
    """What makes a linear layer of a block, as `dense` does; the last of a branch is divided by inputs."""
    make = dense if config.residuals is None else coded_linear
    return make if config.mesh is None else functools.partial(make, product=_product_on(config.mesh, last))


@functools.cache
def _product_on(mesh: Mesh, last: bool) -> Callable[..., Array]:
    """One function for all layers alike, as modules are compared by what they hold."""

    def product(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
        kernel = kernel_on_mesh(kernel, mesh, last=last)
        if last or mesh.shape["tensor"] == 1 or kernel.shape[-1] % mesh.shape["tensor"]:
            return over_tokens(x, kernel, **options)
        return column_product(x, kernel, mesh, **options)

    return product


def norm(config: BlockConfig, dtype: DTypeLike) -> nn.Module:
    """A norm of a block."""
    return (make_norm if config.residuals is None else coded_norm)(config, dtype)


def plain_value(x: Input | Array) -> Array:
    """The array that enters a linear layer."""
    return x.value if isinstance(x, Input) else x


def kept_as_codes(x: Float[Array, "... D"], bits: Bits) -> Input | Float[Array, "... D"]:
    """`x` to enter a linear layer, which keeps codes of it if it keeps anything."""
    if bits.inputs == 32:
        return x
    return Input(x, Partial(decode, encode(x, bits.inputs, group=bits.group)))


def activated(
    config: BlockConfig, dropout: Dropout, *inner: Float[Array, "... F"]
) -> Input | Float[Array, "... F"]:
    """The activation, gated by the second array where there are two, and dropout, to enter a linear layer."""
    bits = config.residuals
    f = ACTIVATIONS[config.activation]
    own = bits.gated if config.gated else bits.activation
    if own == 4 and not config.gated:
        return kept_as_codes(dropout(activate(*inner, f, GRIDS[config.activation], group=bits.group)), bits)
    product = functools.partial(_product, f)
    if own == 32:
        return kept_as_codes(dropout(recompute(product)(*inner)), bits)
    codes = tuple(bits.codes(x, own) for x in inner)
    y = recomputed_from_codes(product, inner, tuple(own for own, _ in codes))
    if bits.inputs == 32 or dropout.is_on():
        return kept_as_codes(dropout(y), bits)
    return Input(y, Partial(functools.partial(_of_codes, product), *(entering for _, entering in codes)))


def _product(f: Callable[[Array], Array], x: Array, by: Array | None = None) -> Array:
    return f(x) if by is None else f(x) * by


def _of_codes(f: Callable[..., Array], *codes: Codes | Array) -> Array:
    return f(*map(decode, codes))


def attended(bits: Bits, f: Callable[..., Array], x: tuple[Array, ...], rest: tuple[Any, ...]) -> Array:
    """`f(*x, *rest)`, recomputed from codes of `x`, each [B, S, N, H]."""
    if bits.attention == 32:
        return recompute(f)(*x, *rest)
    flat = tuple(part.reshape(*part.shape[:2], -1) for part in x)
    codes = tuple(encode(part, bits.attention, group=bits.group) for part in flat)
    return recomputed_from_codes(f, flat, codes, rest)
