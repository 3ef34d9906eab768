"""Uniform numbers for stochastic rounding, a hash of a key and each number's place in its array.

`jax.random` makes its bits in a kernel of its own on a GPU: they would take as much memory as the float32
moments that are to be avoided. This is elementwise on an iota, so it fuses with the rounding, and a shard
makes its own part: the same numbers on any mesh. Each number is two rounds of MurmurHash3's 32-bit finalizer,
one per word of the key: good for rounding, and for nothing that needs a better source.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, UInt32


def uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Numbers k / 2^24 in [0, 1), float32; the same key and shape give the same numbers."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place = place + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    mixed = _mix(_mix(place ^ words[0]) ^ words[1])
    return (mixed >> 8).astype(jnp.float32) * np.float32(2**-24)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
