"""Numbers that look random and follow from a seed and their place alone, the same in every version of JAX."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

_UINT = jnp.uint32


def noise(seed: Array, shape: Sequence[int]) -> Array:
    """Uniform numbers with mean 0 and variance 1, float32; each follows from its place, whatever the shape.

    Args:
        seed: a scalar, uint32.
        shape: of the result.
    """
    mixed = jnp.broadcast_to(_mixed(seed.astype(_UINT)), tuple(shape))
    for axis in range(len(shape)):
        places = lax.broadcasted_iota(_UINT, tuple(shape), axis)
        mixed = _mixed(mixed ^ (places * _UINT(0x9E3779B9) + _UINT(axis + 1)))
    # 24 bits are a float32 exactly.
    share = (mixed >> _UINT(8)).astype(jnp.float32) * (2.0**-24)
    return math.sqrt(12.0) * (share - (0.5 - 2.0**-25))


def _mixed(bits: Array) -> Array:
    """MurmurHash3's finalizer: every bit of the result depends on every bit given."""
    bits = (bits ^ (bits >> _UINT(16))) * _UINT(0x85EBCA6B)
    bits = (bits ^ (bits >> _UINT(13))) * _UINT(0xC2B2AE35)
    return bits ^ (bits >> _UINT(16))
