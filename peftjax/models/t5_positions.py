"""T5's relative positions: a table of a number per head for every bucket of distances."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def bucket_of(
    distances: Int[np.ndarray, " R"], *, buckets: int, farthest: int, both_sides: bool
) -> Int[np.ndarray, " R"]:
    """The bucket of each distance `key - query`.

    The first half of the buckets are the distances 0, 1, ... one by one; the other half share those up to
    `farthest` at equal ratios, and the last one takes all that are farther. With `both_sides`, half of
    all buckets are for keys after the query; without, those share the bucket of distance 0.
    """
    after = 0
    if both_sides:
        buckets //= 2
        after = np.where(distances > 0, buckets, 0)
        back = np.abs(distances)
    else:
        back = np.maximum(-distances, 0)
    near = buckets // 2
    # In float32, as everywhere: a ratio that is a whole number must not round to the bucket before.
    ratio = np.log(np.maximum(back, near).astype(np.float32) / np.float32(near))
    far = near + (ratio / np.float32(math.log(farthest / near)) * np.float32(buckets - near)).astype(np.int32)
    return after + np.where(back < near, back, np.minimum(far, buckets - 1))


class RelativeBias(nn.Module):
    """What a stack's attention adds to its scores, from a table `embedding` [buckets, N]."""

    heads: int
    buckets: int
    farthest: int
    both_sides: bool
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "1 N T T"]:
        """The bias of every pair of places of a sequence of `length` T."""
        init = nn.initializers.normal(self.init_std)
        shape = (self.buckets, self.heads)
        table = self.param("embedding", init, shape)
        # Row i is row 0 moved i places on: 2 T numbers a head, cyclic, read T times at a stride of 2 T - 1.
        # So neither the lookup nor its gradient is T times larger than the distances.
        around = np.concatenate([np.arange(length), np.arange(-length, 0)])
        settings = {"buckets": self.buckets, "farthest": self.farthest, "both_sides": self.both_sides}
        by_distance = jnp.take(table, bucket_of(around, **settings), axis=0).T.astype(self.dtype)
        rows = jnp.tile(by_distance, (1, length))[:, : length * (2 * length - 1)]
        return rows.reshape(1, self.heads, length, 2 * length - 1)[..., :length]
