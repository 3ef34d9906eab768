"""Clusters of the rows of a singular basis, the same as those of the usual PyTorch library from one seed.

Files of an AdaMSS adapter hold what is trained of each cluster, and not which rows belong to it: that follows
from the base. So the decomposition and the clustering are those of `torch.svd_lowrank` and of scikit-learn's
`KMeans(init="random")`, from the same random numbers; both are MT19937's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SEED = 123456789
"""Of the rows that the clusters begin with."""
ITERATIONS = 10
_POWERS = 2
_TOLERANCE = 1e-4


class Basis(NamedTuple):
    """The first directions of `w [m, n]`: `left [m, r]` and `right [r, n]`."""

    left: Array
    right: Array


def first_directions(w: Array, rank: int, seed: int) -> Basis:
    """The first singular directions of `w [m, n]`, by two power iterations of random numbers."""
    rank = min(rank, *w.shape)
    tall = w if w.shape[0] >= w.shape[1] else w.T
    q = jnp.linalg.qr(tall @ normal_numbers(seed, (tall.shape[1], rank)))[0]
    for _ in range(_POWERS):
        q = jnp.linalg.qr(tall @ jnp.linalg.qr(tall.T @ q)[0])[0]
    u, _, vt = jnp.linalg.svd(q.T @ tall, full_matrices=False)
    return Basis(q @ u, vt) if tall is w else Basis(vt.T, (q @ u).T)


def normal_numbers(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """What `torch.randn` gives on a CPU after `torch.manual_seed`, of 16 numbers or more."""
    generator, size = np.random.RandomState(seed), int(np.prod(shape))

    def uniform(count: int) -> np.ndarray:
        bits = generator.randint(0, 2**32, count, dtype=np.uint32) & np.uint32(2**24 - 1)
        return bits.astype(np.float32) * np.float32(2.0**-24)

    def normal(drawn: np.ndarray) -> np.ndarray:
        pairs = drawn.reshape(-1, 2, 8)
        radius, angle = np.sqrt(-2.0 * np.log1p(-pairs[:, 0])), 2.0 * np.pi * pairs[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

    numbers = np.resize(uniform(max(size, 16)), max(size, 16))
    whole = len(numbers) // 16 * 16
    numbers[:whole] = normal(numbers[:whole])
    if len(numbers) % 16:
        numbers[-16:] = normal(uniform(16))
    return numbers[:size].reshape(shape)


def clustered(rows: Array, count: int) -> Array:
    """The cluster of each of `rows [m, r]`, of so many, by k-means from as many of the rows."""
    m = len(rows)
    first = np.random.RandomState(SEED).choice(m, count, replace=False, p=np.full(m, 1.0 / m))
    rows = rows - rows.mean(axis=0)
    tolerance = _TOLERANCE * rows.var(axis=0).mean()

    def nearest(centers: Array) -> Array:
        return jnp.argmin(jnp.sum(centers**2, axis=-1) - 2.0 * rows @ centers.T, axis=-1)

    def moved(state: tuple[Array, Array]) -> tuple[Array, Array]:
        centers, done = state
        new = _means(rows, centers, nearest(centers))
        still = jnp.sum((new - centers) ** 2) <= tolerance
        return jnp.where(done, centers, new), done | still

    state = (rows[first], jnp.zeros((), bool))
    for _ in range(ITERATIONS):
        state = moved(state)
    return nearest(state[0]).astype(jnp.int32)


def _means(rows: Array, centers: Array, labels: Array) -> Array:
    """The means of the clusters; one without rows takes the row that is farthest from its center."""
    count = len(centers)
    own = jax.nn.one_hot(labels, count, dtype=rows.dtype)
    sizes = own.sum(axis=0)
    empty = sizes == 0.0
    far = jax.lax.top_k(jnp.sum((rows - centers[labels]) ** 2, axis=-1), count)[1]
    taken = far[jnp.maximum(jnp.cumsum(empty) - 1, 0)]  # of each empty cluster, in turn
    moves = own[taken] * empty[:, None]  # [empty cluster, old cluster]
    sums = own.T @ rows - moves.T @ rows[taken]
    sums = jnp.where(empty[:, None], rows[taken], sums)
    sizes = jnp.where(empty, 1.0, sizes - moves.sum(axis=0))
    return sums / sizes[:, None]
