"""Singular value decompositions, and low-rank factors that share the singular values evenly.

w = u diag(s) vᵀ      a = √s uᵀ,  b = √s vᵀ      aᵀb = w      aaᵀ = bbᵀ = diag(s)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.errors import PeftError

NEGLIGIBLE = 1e-6
"""Singular values at most this share of the largest count as zero."""


class Svd(NamedTuple):
    """A thin decomposition `u diag(sizes) vt` of matrices `[*stack, n, m]`, the largest value first."""

    u: Array  # [*stack, n, k]
    sizes: Array  # [*stack, k]
    vt: Array  # [*stack, k, m]


def balanced(svd: Svd, rank: int | None = None) -> tuple[Array, Array]:
    """Factors `a [*stack, r, n]` and `b [*stack, r, m]` of the first r directions, all by default."""
    root = jnp.sqrt(svd.sizes[..., :rank])[..., None]
    return root * svd.u[..., :rank].swapaxes(-1, -2), root * svd.vt[..., :rank, :]


def svd_of(w: Array) -> Svd:
    """The decomposition of matrices."""
    return Svd(*jnp.linalg.svd(w, full_matrices=False))


def svd_of_product(a: Array, b: Array) -> Svd:
    """The decomposition of `aᵀb` for `a [*stack, r, n]` and `b [*stack, r, m]`.

    Two thin QR decompositions and an r x r SVD; the product is not formed.
    """
    q_a, r_a = jnp.linalg.qr(a.swapaxes(-1, -2))
    q_b, r_b = jnp.linalg.qr(b.swapaxes(-1, -2))
    u, sizes, vt = svd_of(r_a @ r_b.swapaxes(-1, -2))
    return Svd(q_a @ u, sizes, vt @ q_b.swapaxes(-1, -2))


def randomized_svd(key: Array, w: Array, rank: int, iterations: int) -> Svd:
    """The leading part of an SVD by subspace iteration, with a few directions more than the rank."""
    width = min(rank + 8, *w.shape[-2:])
    y = w @ jax.random.normal(key, (*w.shape[:-2], w.shape[-1], width))
    for _ in range(iterations):
        y = w @ (w.swapaxes(-1, -2) @ jnp.linalg.qr(y)[0])
    q = jnp.linalg.qr(y)[0]
    u, sizes, vt = svd_of(q.swapaxes(-1, -2) @ w)
    return Svd(q @ u, sizes, vt)


def rebalance(a: Array, b: Array) -> tuple[Array, Array]:
    """Factors with the same product `aᵀb` that share its singular values evenly (arXiv 2505.22922).

        aᵀ = Q_a R_a,  bᵀ = Q_b R_b,  R_a R_bᵀ = u s vᵀ      a' = √s (Q_a u)ᵀ,  b' = √s (Q_b v)ᵀ

    so that a'a'ᵀ = b'b'ᵀ = diag(s), in float32; the matrices of a stack come one after the other. A matrix
    whose product has a rank below r (the smallest of its r singular values is at most 1e-6 of the largest, or
    something is not finite) keeps the factors it has: in balance, both sides of a lost direction would be
    zero, and no gradient could ever bring it back. That is so for a LoRA at its start, where b = 0.

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
    """Of one matrix. Several programs of batched decompositions at once deadlock XLA's CPU runtime."""
    a, b = pair
    svd = svd_of_product(a.astype(jnp.float32), b.astype(jnp.float32))
    new_a, new_b = balanced(svd)
    full = svd.sizes[-1] > NEGLIGIBLE * svd.sizes[0]
    return jnp.where(full, new_a.astype(a.dtype), a), jnp.where(full, new_b.astype(b.dtype), b)
