"""Layer and RMS norms that keep the normalized values as codes, and `r` in float32.

    x̂ = (x - μ) r          RMS: μ = 0;   r = 1 / sqrt(mean((x - μ)²) + ε)
    dx = r (t - mean(t) - x̂ mean(t x̂)),   t = (offset + scale) g          RMS: without mean(t)
    d scale = Σ g x̂,   d bias = Σ g

Codes of 4 bits are good enough for dx, in which x̂ only takes part along one direction; not for d scale (nine
percent off, measured), nor where x̂ stands for the norm's result in the gradient of a linear layer, as
`scale x̂ + bias`. Those two may read finer codes, which are not kept where nothing of that kind is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from peftjax.core.derivatives import with_backward
from peftjax.ops.coded.linear import with_tangent_of
from peftjax.quantize import Codes, decode


@dataclass(frozen=True)
class Norm:
    """What a norm computes.

    Attributes:
        plain: `(x, scale, bias) -> y`, the norm itself; bias may be None.
        centered: whether the mean is taken off: a layer norm.
        epsilon: added to the variance.
        offset: of the scale.
        dtype: of the result.
    """

    plain: Callable[[Array, Array, Array | None], Array]
    centered: bool
    epsilon: float
    offset: float
    dtype: DTypeLike


def statistics(norm: Norm, x: Array) -> tuple[Array, Array]:
    """`x̂ [..., D]` in the norm's dtype and `r [..., 1]` in float32, neither differentiated."""
    wide = lax.stop_gradient(x).astype(jnp.float32)
    if norm.centered:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    r = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + norm.epsilon)
    return (wide * r).astype(norm.dtype), r


def normalize(
    norm: Norm,
    x: Array,
    scale: Array,
    bias: Array | None,
    code: Codes | Array,
    r: Array,
    fine: Codes | Array | None = None,
) -> Array:
    """`norm.plain(x, scale, bias)`; backward keeps no `x`.

    Args:
        norm: what is computed.
        x: `[..., D]`.
        scale: `[D]`; where it is not trained, `fine` is not kept.
        bias: `[D]` or None.
        code: of x̂, for the gradient of `x`.
        r: from `statistics`.
        fine: of x̂, for the gradient of `scale`; by default `code`.
    """
    y = _normalize(norm, x, *lax.stop_gradient((scale, bias)), code, r)
    recomputed = jax.checkpoint(partial(scaled, norm), prevent_cse=False)
    return with_tangent_of(y, recomputed(code if fine is None else fine, scale, bias))


def scaled(norm: Norm, code: Codes | Array, scale: Array, bias: Array | None) -> Array:
    """What the norm gives, made of the codes of x̂."""
    y = decode(code).astype(jnp.float32) * (norm.offset + scale.astype(jnp.float32))
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(norm.dtype)


def _normalize(norm: Norm, *args: Any) -> Array:
    def plain(x: Array, scale: Array, bias: Array | None, code: Any, r: Array) -> Array:
        return norm.plain(x, scale, bias)

    def forward(x: Array, scale: Array, bias: Array | None, code: Any, r: Array) -> tuple[Array, tuple]:
        return _normalize(norm, x, scale, bias, code, r), (scale, code, r)

    return with_backward(plain, forward, partial(_backward, norm, args[0].dtype))(*args)


def _backward(norm: Norm, dtype: DTypeLike, residuals: tuple, g: Array) -> tuple:
    scale, code, r = residuals
    unit = decode(code).astype(jnp.float32)
    t = g.astype(jnp.float32) * (norm.offset + scale.astype(jnp.float32))
    dx = t - unit * jnp.mean(t * unit, axis=-1, keepdims=True)
    if norm.centered:
        dx = dx - jnp.mean(t, axis=-1, keepdims=True)
    return (r * dx).astype(dtype), None, None, None, None
