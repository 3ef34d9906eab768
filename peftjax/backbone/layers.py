"""Layers shared by the model families: linear layers, norms, activations, dropout.

Weights reach plain `dot_general` and `gather` equations only, after a cast to the compute dtype, so
any of them may be replaced by a structured weight. Casts of weights, norms, activations and dropout
masks are recomputed in the backward pass (`jax.checkpoint`), which costs element-wise passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from peftjax.weights.dropout import drop
from peftjax.weights.sharding import is_explicit

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activations by their Hugging Face `hidden_act` name; `gelu` is the exact one (erf)."""

# Blocks run inside a scan, whose forward and backward loops cannot share subexpressions, so the
# barriers of `prevent_cse` would only cost fusion.
recompute = partial(jax.checkpoint, prevent_cse=False)
recompute_module = partial(nn.remat, prevent_cse=False)
RecomputedDense = recompute_module(nn.Dense)
RecomputedLayerNorm = recompute_module(nn.LayerNorm)


def dense(
    features: int,
    init_std: float,
    dtype: DTypeLike,
    name: str | None = None,
    *,
    bias: bool = True,
    product: Callable[..., Array] | None = None,
) -> nn.Module:
    """A linear layer `x W + b` with `kernel` [in, features] drawn from N(0, init_std^2).

    The backward pass keeps `x` and recomputes the cast of the stored kernel; without the recompute, a scan
    would keep a second copy of every layer's kernel in `dtype`.

    Args:
        features: of the result.
        init_std: standard deviation of the kernel's first numbers.
        dtype: of the computation.
        name: of the module.
        bias: whether there is one.
        product: `(x, kernel) -> x W`, by default `over_tokens`.
    """
    return RecomputedDense(
        features,
        dtype=dtype,
        kernel_init=nn.initializers.normal(init_std),
        use_bias=bias,
        dot_general=product or over_tokens,
        name=name,
    )


def over_tokens(x: Float[Array, "... D"], kernel: Float[Array, "D F"], *_: Any, **options: Any) -> Array:
    """`x · kernel`, all axes of x but the last taken as one.

    The kernel's gradient is a product over those axes; over several, the compiler rearranges its operands
    first (measured on a CPU: a quarter of a step of full fine-tuning). Where shardings are part of the
    type, axes with different shardings cannot become one.
    """
    flat = x if x.ndim == 2 or is_explicit(x) else x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(flat, kernel, (((flat.ndim - 1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def layer_norm(epsilon: float, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """A layer norm over the last axis: statistics in float32, result and residual in `dtype`."""
    return RecomputedLayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * (offset + scale)` over the last axis, in float32.

    `offset` is 0, or 1 for families whose stored scale is a difference from one. With `scale_last`
    the normalized x is rounded to `dtype` before it is scaled, which is when Llama scales it.
    """

    epsilon: float
    dtype: DTypeLike
    offset: float = 0.0
    scale_last: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalize the last axis."""
        start = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32)

        return recompute(partial(rms_normalized, self.epsilon, self.dtype, self.offset, self.scale_last))(
            x, scale
        )


def rms_normalized(
    epsilon: float, dtype: DTypeLike, offset: float, scale_last: bool, x: Array, scale: Array
) -> Array:
    """`RMSNorm` as a function."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    if scale_last:
        return wide.astype(dtype) * (offset + scale).astype(dtype)
    return (wide * (offset + scale.astype(jnp.float32))).astype(dtype)


def dropout(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """`drop` where there is a key; the backward pass keeps the key and recomputes the mask."""
    return x if key is None or not rate else recompute(drop, static_argnums=1)(x, rate, key)


class Dropout(nn.Module):
    """`dropout` at `rate` when an rng named "dropout" is given to `apply`, else the identity."""

    rate: float

    def __call__(self, x: Array) -> Array:
        """Drop entries of `x`, any shape."""
        return dropout(x, self.rate, self.make_rng("dropout")) if self.is_on() else x

    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self.rate > 0.0 and self.has_rng("dropout")
