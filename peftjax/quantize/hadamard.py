"""The Hadamard rotation: an orthogonal change of basis that spreads what is large over many numbers.

Of weights before they are coded: QuaRot, Ashkboos et al., NeurIPS 2024, arXiv 2404.00456; of a diffusion
transformer's, LRQ-DiT, arXiv 2508.03485.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

LARGEST_FACTOR = 64
"""Of the matrices whose Kronecker product the rotation is: small, as devices have units for."""


def rotated(x: Float[Array, "*lead n"]) -> Float[Array, "*lead n"]:
    """`x R`, in the dtype of x; R is symmetric and its own inverse.

        R = I ⊗ H_b / √b,   H_2b = [[H_b, H_b], [H_b, -H_b]],   b the largest power of two that divides n

    Args:
        x: any floating dtype; sums are float32.
    """
    n = x.shape[-1]
    block = n & -n
    factors = []
    while block > 1:
        factors.append(min(block, LARGEST_FACTOR))
        block //= factors[-1]
    y = x.reshape(*x.shape[:-1], -1, *factors).astype(jnp.float32)
    for place, factor in enumerate(factors):
        axis = x.ndim + place
        matrix = jnp.asarray(_hadamard(factor))
        y = jnp.moveaxis(jnp.tensordot(y, matrix, (axis, 0), precision=lax.Precision.HIGHEST), -1, axis)
    return y.reshape(x.shape).astype(x.dtype)


def _hadamard(size: int) -> np.ndarray:
    """`H / √size`, of a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))
