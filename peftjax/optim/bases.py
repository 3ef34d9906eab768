"""Orthonormal bases of the leading singular subspace of gradient matrices, whole or known by products only.

A gradient `G [*stack, in, out]` is a stack of matrices. A basis of rank r on its input side has orthonormal
rows `P [*stack, r, in]`, the first r left singular vectors of each matrix; on its output side
`[*stack, r, out]`, the right ones; both in order of falling singular value. No basis of rank r keeps more of
G: ‖G - Pᵀ P G‖² is the sum of the squared singular values that are left out.

- `svd_basis`: the thin singular value decomposition. Exact; slow on accelerators.
- `gram_basis`: the eigenvectors of G Gᵀ (or Gᵀ G). One product and one symmetric problem; squaring loses the
  directions with a singular value below 3e-4 of the largest in float32.
- `subspace_iteration`: randomized (Halko, Martinsson, Tropp 2011, arXiv 0909.4061), and needs G only through
  products with few vectors, as gradient passes give them without ever forming G.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.checks import at_least
from peftjax.core.errors import PeftError
from peftjax.weights.sharding import whole

Side = Literal["input", "output"]
_EXACT = lax.Precision.HIGHEST  # float32 products, also where the default is bfloat16 or TF32
_WARM_NOISE = 1e-3


def svd_basis(g: Array, rank: int, side: Side) -> Array:
    """The first `rank` singular vectors of one side of each matrix, by singular value decomposition.

    Args:
        g: `[*stack, in, out]`, any floating dtype.
        rank: at most min(in, out).
        side: 'input' for left singular vectors, 'output' for right ones.

    Returns:
        `[*stack, rank, in or out]`, float32.

    Raises:
        PeftError: the rank is not positive or larger than the matrices.
    """
    _require_rank(g, rank)

    def one(matrix: Array) -> Array:
        u, _, vh = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
        return u[:, :rank].T if side == "input" else vh[:rank]

    return _one_by_one(one, g)


def gram_basis(g: Array, rank: int, side: Side) -> Array:
    """As `svd_basis`, by the eigenvectors of the Gram matrix of the compressed side: G Gᵀ or Gᵀ G.

    Raises:
        PeftError: as `svd_basis`.
    """
    _require_rank(g, rank)

    def one(matrix: Array) -> Array:
        rows = matrix.astype(jnp.float32)
        rows = rows if side == "input" else rows.T
        return _leading(jnp.matmul(rows, rows.T, precision=_EXACT), rank)

    return _one_by_one(one, g)


def subspace_iteration(
    left: Callable[[Any], Any], right: Callable[[Any], Any], start: Any, iterations: int, rank: Any
) -> Any:
    """As `svd_basis` for gradients that are known through products only, 2·iterations + 1 of them.

        Q = orth(start);  `iterations` times:  Q = orth(orth(Q G) Gᵀ);  rows of Q rotated to falling ‖q G‖

    The error falls by (σ_k+1 / σ_r)² an iteration, k the rows of the start: some more than r (8, say) help.

    Args:
        left: `{path: Q [*stack, k, in]}` to `{path: Q G [*stack, k, out]}`, for all matrices at once.
        right: `{path: W [*stack, k, out]}` to `{path: W Gᵀ [*stack, k, in]}`.
        start: `{path: [*stack, k, in]}`, or any pytree; see `start_rows`. Need not be orthonormal.
        iterations: 0 only rotates the start; 1 is enough for a warm one, 2 for a random one.
        rank: r, at most that many rows are returned; an integer or a pytree of them like `start`.

    For a basis of the output side, exchange `left` and `right`, and give starts `[*stack, k, out]`.

    Returns:
        A pytree like `start` of `[*stack, min(rank, k), in]` in the start's dtype; rows that `left` and
        `right` give are made orthonormal in float32 and kept in their own dtype.

    Raises:
        PeftError: a negative number of iterations.
    """
    at_least("subspace_iteration", "iterations", iterations, 0)
    q = jax.tree.map(orthonormal_rows, start)
    b = left(q)
    for _ in range(iterations):
        q = jax.tree.map(orthonormal_rows, right(jax.tree.map(orthonormal_rows, b)))
        b = left(q)
    ranks = jax.tree.map(lambda _: rank, q) if isinstance(rank, int) else rank
    return jax.tree.map(_rotated, q, b, ranks)


def _rotated(q: Array, b: Array, rank: int) -> Array:
    """The rows of q turned to the singular vectors of b = q G, the leading ones only."""

    def one(pair: tuple[Array, Array]) -> Array:
        rows, products = (a.astype(jnp.float32) for a in pair)
        gram = jnp.matmul(products, products.T, precision=_EXACT)
        turned = jnp.matmul(_leading(gram, min(rank, rows.shape[0])), rows, precision=_EXACT)
        return turned.astype(q.dtype)

    return _one_by_one(one, (q, b))


def start_rows(key: Array, shape: tuple[int, ...], known: Array | None = None) -> Array:
    """The start of a subspace iteration: random rows, the first of them near a basis that is known.

    Args:
        key: of the random numbers.
        shape: `(*stack, k, n)`.
        known: `[*stack, r, n]` with r <= k, an earlier basis; all zero counts as none.

    Returns:
        float32 of the shape; the known rows with noise of 1e-3, which matters where they are zero only.
    """
    noise = jax.random.normal(key, shape, jnp.float32)
    if known is None:
        return noise
    r = known.shape[-2]
    first = known.astype(jnp.float32) + _WARM_NOISE * shape[-1] ** -0.5 * noise[..., :r, :]
    return jnp.concatenate([first, noise[..., r:, :]], axis=-2)


def pointed(rows: Array) -> Array:
    """The rows `[..., r, n]` with the signs that make the entry of largest magnitude of each positive."""
    largest = jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), axis=-1, keepdims=True), axis=-1)
    return jnp.where(largest < 0, -rows, rows)


def orthonormal_rows(rows: Array) -> Array:
    """Orthonormal rows that span the given ones `[*stack, k, n]`, k <= n; where those are dependent, more.

    Returns:
        The same shape and dtype; computed in float32.

    Raises:
        PeftError: more rows than they have entries.
    """
    # Householder's QR never divides by a pivot, as Cholesky's does, so that zero or dependent rows (a
    # gradient of zeros) still give orthonormal ones. Where rows are sharded it gathers `k x n` numbers, as
    # many as the basis has, which every device needs anyway; all else is matrix products.
    k, n = rows.shape[-2:]
    if k > n:
        raise PeftError(f"orthonormal_rows: {k} rows of {n} entries cannot be orthonormal; lower the rank")

    def one(rows: Array) -> Array:
        return jnp.linalg.qr(rows.astype(jnp.float32).T, mode="reduced")[0].T.astype(rows.dtype)

    return _one_by_one(one, rows)


def captured_energy(g: Array, basis: Array, side: Side) -> Array:
    """The share of each gradient that a basis keeps, ‖P G‖² / ‖G‖².

    Args:
        g: `[*stack, in, out]`.
        basis: `[*stack, r, in]`, or `[*stack, r, out]` for the output side.
        side: of the basis.

    Returns:
        `[*stack]`, float32, from 0 to 1; 1 where G is zero.
    """

    def one(pair: tuple[Array, Array]) -> Array:
        matrix, rows = (a.astype(jnp.float32) for a in pair)
        kept = jnp.matmul(rows, matrix if side == "input" else matrix.T, precision=_EXACT)
        whole = jnp.sum(matrix**2)
        return jnp.where(whole > 0, jnp.sum(kept**2) / jnp.where(whole > 0, whole, 1.0), 1.0)

    return _one_by_one(one, (g, basis))


def _leading(gram: Array, rank: int) -> Array:
    """The first eigenvectors of symmetric matrices `[..., n, n]` as rows, by falling eigenvalue."""
    vectors = jnp.linalg.eigh(gram)[1]
    return jnp.matrix_transpose(vectors[..., ::-1][..., :rank])


def _one_by_one(fn: Callable[[Any], Array], arrays: Any) -> Array:
    """`fn` on each matrix of the stack in turn; axis by axis, so that no sharded axes are merged.

    In turn, so that the float32 copy and the workspace of a decomposition are those of one matrix.
    """
    leaf = jax.tree.leaves(arrays)[0]
    for _ in range(leaf.ndim - 2):
        fn = _mapped(fn)
    return fn(jax.tree.map(whole, arrays))


def _mapped(fn: Callable[[Any], Array]) -> Callable[[Any], Array]:
    return lambda arrays: lax.map(fn, arrays)


def _require_rank(g: Array, rank: int) -> None:
    if not 1 <= rank <= min(g.shape[-2:]):
        raise PeftError(
            f"basis: rank {rank} does not fit matrices of {g.shape[-2]} x {g.shape[-1]}; "
            "give one from 1 to the smaller side"
        )
