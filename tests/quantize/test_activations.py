"""Codes of activations: what they promise, and the search of their ranges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import quick_at

from peftjax.quantize.activations import LogSqrt2, moved_ends, of_tokens, shifts_of, uniform
from peftjax.quantize.clipping import PERCENTILES, best, candidates, no_tails, squared_errors

RNG = np.random.default_rng(0)
SIZES = np.array([0.1, 1.0, 30.0, 1.0], np.float32)
PLACES = np.array([0.0, 2.0, -5.0, 40.0], np.float32)
X = RNG.standard_normal((400, 4)).astype(np.float32) * SIZES + PLACES


@pytest.mark.slow
@pytest.mark.parametrize("bits", quick_at([4, 2, 7], 0))
def test_a_power_of_root_two_is_a_shift_and_a_factor_of_its_parity(bits):
    codes = jnp.arange(2**bits, dtype=jnp.uint8)
    last = 2**bits - 1
    own = LogSqrt2(jnp.float32(0.75), bits)
    values = np.asarray(own.decode(codes), np.float64)
    wanted = 0.75 * 2.0 ** (-np.arange(last) / 2)
    np.testing.assert_allclose(values[:-1], wanted, rtol=2e-7)
    assert values[-1] == 0
    shifts, odd = map(np.asarray, shifts_of(codes))
    np.testing.assert_allclose(2.0**-shifts * (1 + (2**0.5 - 1) * odd), 2.0 ** (-np.arange(last + 1) / 2))
    assert np.all(np.diff(values) < 0)
    np.testing.assert_array_equal(own.encode(jnp.asarray(values, jnp.float32)), codes)
    # What is as large as the scale, or larger; what a mask hides.
    np.testing.assert_array_equal(own.encode(jnp.array([0.75, 0.9, 0.0])), [0, 0, last])
    np.testing.assert_array_equal(own.rounded(jnp.array([0.75, 0.9, 0.0])), [0.75, 0.75, 0.0])
    slope = jax.vmap(jax.grad(lambda a: own.rounded(a)))(jnp.array([0.7, 0.9, 0.0]))
    np.testing.assert_array_equal(slope, [1, 0, 1])


@pytest.mark.parametrize("symmetric", [False, True])
def test_uniform_codes_are_those_of_the_equation(symmetric):
    low, high = X.min(0), X.max(0)
    own = uniform(jnp.asarray(low), jnp.asarray(high), 4, symmetric=symmetric)
    scale = np.asarray(own.scale)
    if symmetric:
        np.testing.assert_allclose(scale, np.maximum(-low, high) / 7, rtol=1e-6)
        whole = np.clip(np.round(X / scale), -7, 7)
    else:
        zero = np.round(-low / scale)
        np.testing.assert_allclose(scale, (high - low) / 15, rtol=1e-6)
        np.testing.assert_array_equal(own.zero, zero)
        assert zero[3] < -15  # a range far from zero
        codes = np.clip(np.round(X / scale) + zero, 0, 15)
        np.testing.assert_array_equal(own.encode(jnp.asarray(X)), codes)
        whole = codes - zero
    np.testing.assert_allclose(own.decode(own.encode(jnp.asarray(X))), whole * scale, rtol=1e-6)
    np.testing.assert_array_equal(own.rounded(jnp.asarray(X)), own.decode(own.encode(jnp.asarray(X))))
    ends = np.array([[-7.0], [7.0]]) if symmetric else np.array([-zero, 15 - zero])
    within = jnp.asarray((ends[:, None] + np.array([[-0.4], [0.4]])) * scale)
    slope = jax.grad(lambda x: own.rounded(x).sum())(within)
    np.testing.assert_allclose(slope, np.broadcast_to(1.0, slope.shape), rtol=1e-6)
    cut_off = jnp.asarray((ends + np.array([[-0.6], [0.6]])) * scale)
    assert not np.any(jax.grad(lambda x: own.rounded(x).sum())(cut_off))


def test_channels_without_a_width_have_a_step_all_the_same():
    low = jnp.array([0.0, 3.0, -1.0, -2.0])
    own = uniform(low, jnp.array([0.0, 3.0, 1.0, -2.0]), 4)
    for x in (low, jnp.array([0.0, 3.0, 1.0, -2.0])):
        assert np.abs(own.rounded(x) - x).max() < 0.07
    assert np.all(np.isfinite(own.scale) & (own.scale > 0))
    assert float(uniform(jnp.float32(0), jnp.float32(0), 4).rounded(jnp.float32(0))) == 0


def test_each_token_has_its_own_range():
    own = of_tokens(jnp.asarray(X), 8, 0.5)
    np.testing.assert_allclose(own.scale[:, 0], 0.5 * np.abs(X).max(1) / 127, rtol=1e-6)
    assert float(of_tokens(jnp.zeros((1, 3)), 8).rounded(jnp.zeros((1, 3))).max()) == 0


@pytest.mark.slow
def test_moved_ends_are_those_of_the_range_and_have_gradients():
    start = uniform(jnp.asarray(X.min(0)), jnp.asarray(X.max(0)), 4)
    nothing = jnp.zeros(4)
    same = moved_ends(start, nothing, nothing)
    np.testing.assert_array_equal(same.scale, start.scale)
    np.testing.assert_array_equal(same.zero, start.zero)
    new = moved_ends(start, nothing + 0.2, nothing - 0.1)
    width, first = 15 * start.scale, -start.zero * start.scale
    np.testing.assert_allclose(new.scale, 0.7 * start.scale, rtol=1e-6)
    # The zero point is rounded: by no more than half of a step.
    assert np.all(np.abs(-new.zero * new.scale - (first + 0.2 * width)) <= 0.501 * new.scale)

    def error(low, high):
        return jnp.sum((moved_ends(start, low, high).rounded(jnp.asarray(X)) - X) ** 2)

    for gradient in jax.grad(error, (0, 1))(nothing - 0.01, nothing + 0.01):
        assert np.all(np.isfinite(gradient) & (gradient != 0))


def in_parts(rows, counts, maker):
    """The chosen quantizer and the tails of rows that come in three parts."""
    tails = no_tails(rows.shape[1], len(rows))
    parts = [(jnp.asarray(x), jnp.asarray(c)) for x, c in zip(np.split(rows, 3), np.split(counts, 3))]
    for part in parts:
        tails = tails.joined(*part)
    tried, nothing = candidates(tails, maker)
    return best(tried, sum((squared_errors(tried, *part) for part in parts), nothing)), tails


@pytest.mark.slow
def test_the_range_is_cut_off_at_the_percentile_with_the_least_error():
    rows = RNG.standard_normal((3 * 700, 3)).astype(np.float32)
    rows[5, 0], rows[6, 1] = 300.0, 12.0  # one that is better cut off at 8 bits, and one that is not
    counts = RNG.random(len(rows)) > 0.1
    counts[5:7] = True
    rows[~counts] = 1e6
    own, tails = in_parts(rows, counts, partial(uniform, bits=8))
    assert len(tails.low) < 10
    kept = rows[counts]
    errors, scales = [], []
    for percentile in PERCENTILES:
        low, high = (np.quantile(kept, p, axis=0) for p in (1 - percentile, percentile))
        for got, want in zip(tails.range_of(percentile), (low, high)):
            np.testing.assert_allclose(got, want, rtol=1e-4)
        scale = (high - low) / 255
        zero = np.round(-low / scale)
        codes = np.clip(np.round(kept / scale) + zero, 0, 255)
        errors.append(np.sum(((codes - zero) * scale - kept) ** 2, 0))
        scales.append(scale)
    chosen = np.argmin(errors, 0)
    assert len(set(chosen)) > 1
    np.testing.assert_allclose(own.scale, np.array(scales)[chosen, np.arange(3)], rtol=1e-4)
    log, _ = in_parts(np.abs(rows[:, :1]) / 400, counts, lambda low, high: LogSqrt2(high, 4))
    assert isinstance(log, LogSqrt2)
    assert log.scale.shape == (1,)
