"""Layer and RMS norms that keep the normalised values as codes, and `r` in float32.

    x̂ = (x - μ) r          RMS: μ = 0;   r = 1 / sqrt(mean((x - μ)²) + ε)
    dx = r (t - mean(t) - x̂ mean(t x̂)),   t = (offset + scale) g          RMS: without mean(t)
    d scale = Σ g x̂,   d bias = Σ g

The same x̂ stand for the norm's result where a linear layer after it is trained: `scale x̂ + bias`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from peftjax.kernels.packed_residuals import Code, decode


@dataclass(frozen=True)
class Norm:
    """What a norm computes.

    Attributes:
        plain: `(x, scale, bias) -> y`, the norm itself; bias may be None.
        centred: whether the mean is taken off: a layer norm.
        epsilon: added to the variance.
        offset: of the scale.
        dtype: of the result.
    """

    plain: Callable[[Array, Array, Array | None], Array]
    centred: bool
    epsilon: float
    offset: float
    dtype: DTypeLike


def statistics(norm: Norm, x: Array) -> tuple[Array, Array]:
    """`x̂ [..., D]` in the norm's dtype and `r [..., 1]` in float32, neither differentiated."""
    wide = lax.stop_gradient(x).astype(jnp.float32)
    if norm.centred:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    r = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + norm.epsilon)
    return (wide * r).astype(norm.dtype), r


def normalise(norm: Norm, x: Array, scale: Array, bias: Array | None, code: Code | Array, r: Array) -> Array:
    """`norm.plain(x, scale, bias)`; backward reads `code`, of x̂, and `r`, and keeps no `x`."""
    return _normalise(norm, x.dtype, x, scale, bias, code, r)


def scaled(norm: Norm, code: Code | Array, scale: Array, bias: Array | None) -> Array:
    """What the norm gives, made of the codes of x̂."""
    y = decode(code).astype(jnp.float32) * (norm.offset + scale.astype(jnp.float32))
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(norm.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise(
    norm: Norm, dtype: DTypeLike, x: Array, scale: Array, bias: Array | None, code: Any, r: Array
) -> Array:
    return norm.plain(x, scale, bias)


def _forward(
    norm: Norm, dtype: DTypeLike, x: Array, scale: Array, bias: Array | None, code: Any, r: Array
) -> tuple[Array, tuple]:
    return norm.plain(x, scale, bias), (scale, bias, code, r)


def _backward(norm: Norm, dtype: DTypeLike, kept: tuple, g: Array) -> tuple:
    scale, bias, code, r = kept
    g, unit = g.astype(jnp.float32), decode(code).astype(jnp.float32)
    t = g * (norm.offset + scale.astype(jnp.float32))
    dx = t - unit * jnp.mean(t * unit, axis=-1, keepdims=True)
    if norm.centred:
        dx = dx - jnp.mean(t, axis=-1, keepdims=True)
    over = tuple(range(g.ndim - 1))
    d_scale = jnp.sum(g * unit, axis=over).astype(scale.dtype)
    d_bias = None if bias is None else jnp.sum(g, axis=over).astype(bias.dtype)
    return (r * dx).astype(dtype), d_scale, d_bias, None, None


_normalise.defvjp(_forward, _backward)
