"""Rotations from skew matrices, as the orthogonal methods train them: the entries above the diagonal."""

import jax.numpy as jnp
import numpy as np
from jax import Array


def skew(entries: Array, size: int) -> Array:
    """`Q [..., b, b]` with `Q = -Qᵀ`, of the entries `[..., b(b-1)/2]` above its diagonal, row by row."""
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((*entries.shape[:-1], size, size), entries.dtype).at[..., rows, columns].set(entries)
    return upper - upper.swapaxes(-1, -2)


def cayley(q: Array, terms: int | None = None) -> Array:
    """The rotation `(I + Q)(I - Q)⁻¹` of a skew Q, or so many terms of its series, the last one halved."""
    unit = jnp.eye(q.shape[-1], dtype=q.dtype)
    if terms is None:
        # (I + Q)(I - Q)⁻¹ = (I - Q)⁻¹(I + Q)
        return jnp.linalg.solve(unit - q, unit + q)
    rotation, power = unit, jnp.broadcast_to(unit, q.shape)
    for term in range(1, terms):
        power = power @ q
        rotation = rotation + (2.0 if term < terms - 1 else 1.0) * power
    return rotation
