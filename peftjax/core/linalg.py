"""Balanced factors of the same product: what a low-rank restart does, of use to any low-rank adapter."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.errors import PeftError

NEGLIGIBLE = 1e-6
"""Singular values at most this share of the largest count as zero."""


def rebalance(a: Array, b: Array) -> tuple[Array, Array]:
    """Factors with the same product `aᵀb` that share its singular values evenly (arXiv 2505.22922).

        aᵀ = Q_a R_a,  bᵀ = Q_b R_b,  R_a R_bᵀ = u s vᵀ      a' = √s (Q_a u)ᵀ,  b' = √s (Q_b v)ᵀ

    so that a'a'ᵀ = b'b'ᵀ = diag(s). Two thin QR decompositions and an r x r SVD in float32; the dense product
    is not formed, and the matrices of a stack come one after the other. A matrix whose product has a rank
    below r (the smallest of its r singular values is at most 1e-6 of the largest, or something is not finite)
    keeps the factors it has: in balance, both sides of a lost direction would be zero, and no gradient could
    ever bring it back. That is so for a LoRA at its start, where b = 0.

    Args:
        a: `[*stack, r, in]`.
        b: `[*stack, r, out]`.

    Returns:
        Both factors in their own dtypes.

    Raises:
        PeftError: stacks or ranks differ, or r is larger than in or out.
    """
    if a.ndim < 2 or a.shape[:-1] != b.shape[:-1] or a.shape[-2] > min(a.shape[-1], b.shape[-1]):
        raise PeftError(
            f"rebalance: a [*stack, r, in] is {a.shape} and b [*stack, r, out] is {b.shape}; "
            "stack and r must agree, and r be at most in and out"
        )
    one = _one
    for _ in a.shape[:-2]:
        one = partial(lax.map, one)
    with jax.default_matmul_precision("highest"):
        return one((a, b))


def _one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
    """Of one matrix. Several programs of batched decompositions at once stop XLA's CPU runtime for good."""
    a, b = pair
    q_a, r_a = jnp.linalg.qr(a.astype(jnp.float32).T)
    q_b, r_b = jnp.linalg.qr(b.astype(jnp.float32).T)
    u, sizes, vt = jnp.linalg.svd(r_a @ r_b.T, full_matrices=False)
    root = jnp.sqrt(sizes)[:, None]
    new_a, new_b = root * (q_a @ u).T, root * (vt @ q_b.T)
    full = sizes[-1] > NEGLIGIBLE * sizes[0]
    return jnp.where(full, new_a.astype(a.dtype), a), jnp.where(full, new_b.astype(b.dtype), b)
