"""Codes of a normal number: the table, each matrix by itself, bytes, and the straight-through gradient."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from peftjax.planner.residuals import kept_arrays
from peftjax.quantize.normal_codes import EPSILON, encode_normal, median_table, round_normal

BITS = (1, 2, 4)
# As the authors' code computes them.
VALUES = {
    1: [0.67449],
    2: [0.37775, 1.26572],
    4: [0.10555, 0.31904, 0.54007, 0.77519, 1.03401, 1.33311, 1.70774, 2.26549],
}
NOISE = np.random.default_rng(0)
W = (NOISE.standard_normal((3, 5, 7)) * [[[0.5]], [[2.0]], [[1e-3]]] + [[[1.0]], [[0.0]], [[-3e-3]]]).astype(
    np.float32
)
G = NOISE.standard_normal(W.shape).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_each_value_is_the_median_of_its_cell(bits):
    values, normal = np.array(median_table(bits)), NormalDist()
    np.testing.assert_allclose(values[len(values) // 2 :], VALUES[bits], atol=1e-5)
    np.testing.assert_array_equal(values, -values[::-1])
    below = [0.0, *(normal.cdf(edge) for edge in (values[1:] + values[:-1]) / 2), 1.0]
    middles = (np.array(below[1:]) + below[:-1]) / 2
    assert max(abs(normal.cdf(value) - middle) for value, middle in zip(values, middles)) < 1e-12


@jax.jit
def found(w, g):
    """Of all bits: the rounded array, its gradient, the codes, and what they decode to."""

    def of(bits):
        rounded, pull = jax.vjp(lambda w: round_normal(w, 1, bits), w)
        codes = encode_normal(w, 1, bits)
        return {"rounded": rounded, "gradient": pull(g)[0], "codes": codes, "decoded": codes.decode()}

    return {bits: of(bits) for bits in BITS}


def parts(w, bits):
    """In float64: table, number of the nearest value, mean and deviation of each matrix of a stack."""
    w = np.asarray(w, np.float64)
    mean, deviation = w.mean((1, 2), keepdims=True), w.std((1, 2), ddof=1, keepdims=True)
    table = np.array(median_table(bits))
    near = np.abs((w - mean)[..., None] / (deviation + EPSILON)[..., None] - table).argmin(-1)
    return table, near, mean, deviation


def test_each_matrix_has_its_mean_and_deviation_and_its_bytes():
    for bits, of in found(W, G).items():
        table, near, mean, deviation = parts(W, bits)
        np.testing.assert_allclose(of["rounded"], table[near] * deviation + mean, rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(of["decoded"], of["rounded"])
        assert all(len(np.unique(matrix)) == len(np.unique(n)) for matrix, n in zip(of["rounded"], near))
        codes, each = of["codes"], 8 // bits
        assert codes.shape == W.shape
        assert codes.codes.shape == (3, -(-35 * bits // 8))
        for packed, own in zip(np.asarray(codes.codes), near.reshape(3, -1)):
            wanted = np.zeros(len(packed), int)
            for n, code in enumerate(own):
                wanted[n // each] |= code << (bits * (n % each))
            np.testing.assert_array_equal(packed, wanted)


def test_codes_stay_where_the_array_is_scaled_and_shifted():
    scaled = found(4 * W, G)
    for bits, of in found(W, G).items():
        np.testing.assert_array_equal(of["codes"].codes[:2], scaled[bits]["codes"].codes[:2])
        np.testing.assert_allclose(4 * of["rounded"][:2], scaled[bits]["rounded"][:2], rtol=1e-5)
    shifted = found(W + 8, G)[1]["rounded"]
    np.testing.assert_allclose(shifted[:2], found(W, G)[1]["rounded"][:2] + 8, rtol=1e-5)


def test_the_gradient_is_that_of_the_straight_through_estimator():
    def estimator(w, bits):
        mean = jnp.mean(w, (1, 2), keepdims=True)
        deviation = jnp.std(w, (1, 2), ddof=1, keepdims=True)
        unit = (w - mean) / (deviation + EPSILON)
        table = jnp.array(median_table(bits), jnp.float32)
        code = table[jnp.abs(lax.stop_gradient(unit)[..., None] - table).argmin(-1)]
        return (unit + lax.stop_gradient(code - unit)) * deviation + mean

    wanted = jax.jit(jax.grad(lambda w: sum(jnp.sum(G * estimator(w, bits)) for bits in BITS)))(W)
    of_each = [found(W, G)[bits]["gradient"] for bits in BITS]
    np.testing.assert_allclose(sum(of_each), wanted, rtol=2e-5, atol=5e-5)
    for got in of_each:
        np.testing.assert_allclose(got.sum((1, 2)), G.sum((1, 2)), atol=1e-4)  # that of the mean


def test_it_keeps_the_array_alone():
    assert not kept_arrays(lambda w, g: jnp.sum(g * round_normal(w, 1, 1)), W, G)
