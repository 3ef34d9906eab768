"""Layers as functions of their parameters, for the small networks that methods add to a backbone.

Parameters are float32, `{"kernel", "bias"}` of a linear layer and `{"scale", "bias"}` of a norm, and are cast
to the dtype of what they meet. Nothing here is recomputed in the backward pass by itself: see `recompute`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Part = Mapping[str, Array]


def uniform_init(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*stack i o"]:
    """Kernels [..., inputs, outputs] from U(±1/√inputs), as torch draws them."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def linear_init(key: Key[Array, ""], shape: tuple[int, ...]) -> dict[str, Array]:
    """`kernel` of this shape [..., inputs, outputs] and `bias` [..., outputs], both from U(±1/√inputs)."""
    bound, (kernel_key, bias_key) = shape[-2] ** -0.5, jax.random.split(key)
    bias = jax.random.uniform(bias_key, (*shape[:-2], shape[-1]), minval=-bound, maxval=bound)
    return {"kernel": uniform_init(kernel_key, shape), "bias": bias}


def norm_init(shape: tuple[int, ...]) -> dict[str, Array]:
    """`scale` one and `bias` zero."""
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def linear(part: Part, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    """`x W + b`, of a part without a bias `x W`."""
    y = x @ part["kernel"].astype(x.dtype)
    return y + part["bias"].astype(x.dtype) if "bias" in part else y


def layer_norm(part: Part, x: Float[Array, "... d"], epsilon: float) -> Float[Array, "... d"]:
    """The layer norm of the last axis, in float32 as its result is."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    return wide * part["scale"] + part["bias"]


def linear_norm(part: Part, norm: Part, x: Float[Array, "... i"], epsilon: float) -> Float[Array, "... o"]:
    """`LN(x W + b)` over the last axis; all but the product in float32."""
    wide = (x @ part["kernel"].astype(x.dtype)).astype(jnp.float32) + part["bias"]
    return layer_norm(norm, wide, epsilon).astype(x.dtype)
