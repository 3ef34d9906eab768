"""The nuclear-norm penalty on the trained entries of a matrix, as a gradient.

R = λ Σ_i σ_i(P),  P the matrix of the trained entries and zeros,  P = U Σ Vᵀ:   dR/dp = λ (U Vᵀ)[M]
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.derivatives import with_backward
from peftjax.weights.layout import Layout

Polar = Literal["newton_schulz", "svd"]
_ITERATIONS = 12


def penalized(
    strength: float, polar: Polar, layout: Layout, values: Array, keep: Array, rows: Array, columns: Array
) -> Array:
    """`values [*stack, K]`; backward adds the gradient of the penalty to theirs.

    Forward mode has the values alone, of which the penalty is no part; along a gradient it has both.

    Args:
        strength: λ.
        polar: how `U Vᵀ` is found, one matrix at a time: exactly, by an SVD; or approximately, by 12
            Newton-Schulz iterations, in which singular values below 1/1000 of the norm fall short.
        layout: of the weight.
        values: the trained entries, absolute.
        keep: which are still trained, truth values.
        rows: of the entries.
        columns: of the entries.
    """

    def unchanged(values: Array, *places: Array) -> Array:
        return values

    # The values that leave are plain: a derivative of a gradient does not add the penalty a second time.
    return with_backward(
        unchanged,
        lambda *arrays: (arrays[0], arrays),
        partial(_backward, strength, polar, layout),
        linear=lambda kept, g: (g, None, None, None),
    )(values, keep, rows, columns)


def _backward(strength: float, polar: Polar, layout: Layout, kept: tuple, g: Array) -> tuple:
    of_polar = polar_factor if polar == "newton_schulz" else exact_polar_factor

    def of_matrix(part: tuple[Array, ...]) -> Array:
        values, kept, rows, columns = part
        keep = kept.astype(jnp.float32)
        matrix = jnp.zeros(layout.matrix, jnp.float32)
        matrix = matrix.at[rows, columns].set(values * keep, mode="drop", unique_indices=True)
        return keep * of_polar(matrix).at[rows, columns].get(mode="fill", fill_value=0)

    parts = tuple(part.reshape(-1, part.shape[-1]) for part in kept)
    penalty = strength * lax.map(of_matrix, parts).reshape(g.shape)
    # Where nothing of a batch counts, neither does the penalty.
    return g + jnp.where(jnp.any(g != 0), penalty, 0.0), None, None, None


def exact_polar_factor(matrix: Array) -> Array:
    """`U Vᵀ` of the thin singular value decomposition."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def polar_factor(matrix: Array) -> Array:
    """`U Vᵀ` by Newton-Schulz: every singular value σ ← (15σ − 10σ³ + 3σ⁵)/8 goes to 1, from σ/‖P‖."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / jnp.maximum(jnp.linalg.norm(wide), jnp.finfo(jnp.float32).tiny)

    def improved(_: int, x: Array) -> Array:
        gram = x @ x.T
        step = gram @ x
        return (15.0 * x - 10.0 * step + 3.0 * (gram @ step)) / 8.0

    x = lax.fori_loop(0, _ITERATIONS, improved, x)
    return x if wide is matrix else x.T
