"""The bytes of a compiled program's arguments as a device holds them."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import compat


def device_bytes(shapes: Any, formats: Any) -> int:
    """The bytes of arrays in the compiled program's layouts."""
    total = 0
    for leaf, held in zip(jax.tree.leaves(shapes), jax.tree.leaves(formats)):
        own = jax.ShapeDtypeStruct(held.sharding.shard_shape(leaf.shape), leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.eval_shape(jax.random.key_data, own)
        total += math.prod(compat.padded_shape(own.shape, held.layout)) * own.dtype.itemsize
    return total
