import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY

from peftjax.quantize.dynamic_map import decode_unit, dynamic_map, encode_unit

BOTH = pytest.mark.parametrize("signed", [True, False])
ALL = jnp.arange(256).astype(jnp.uint8)


def numbers(signed):
    """Of every size down to below the smallest of the map."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, 40_000) * 10.0 ** random.uniform(-8, 0, 40_000)
    return (x if signed else np.abs(x)).astype(np.float32)


@BOTH
def test_the_map_is_256_ascending_numbers_with_zero_and_one(signed):
    values = dynamic_map(signed)
    assert values.shape == (256,)
    assert (np.diff(values) > 0).all()
    assert values[-1] == 1.0
    assert values[127 if signed else 0] == 0.0


def test_the_signed_map_is_symmetric_but_for_one():
    values = dynamic_map(True)
    np.testing.assert_array_equal(values[:127], -values[128:255][::-1])


def test_decades_by_hand():
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    # The smallest decade: one bin (0.1, 1) of 1e-6 signed; two of it unsigned.
    np.testing.assert_allclose(signed[128], 0.55e-6)
    np.testing.assert_allclose(unsigned[1:3], [0.325e-6, 0.775e-6])
    # The next: two bins of 1e-5; the largest: 64 of 1 signed, 128 unsigned.
    np.testing.assert_allclose(signed[129:131], [3.25e-6, 7.75e-6])
    np.testing.assert_allclose(signed[191:255], 0.1 + 0.9 * (np.arange(64) + 0.5) / 64)
    np.testing.assert_allclose(unsigned[127:255], 0.1 + 0.9 * (np.arange(128) + 0.5) / 128)


@BOTH
def test_decoding_is_the_map(signed):
    np.testing.assert_allclose(decode_unit(ALL, signed), dynamic_map(signed), rtol=1e-6)


@BOTH
def test_coding_what_was_decoded_gives_the_codes(signed):
    np.testing.assert_array_equal(encode_unit(decode_unit(ALL, signed), signed), ALL)


@BOTH
def test_codes_are_those_of_the_nearest_numbers(signed):
    x, values = numbers(signed), dynamic_map(signed)
    wanted = np.searchsorted((values[1:] + values[:-1]) / 2, x.astype(np.float64))
    if not signed:
        wanted = np.maximum(wanted, 1)
    found = np.asarray(encode_unit(jnp.asarray(x), signed)).astype(int)
    # A number within rounding of a middle may go to either side.
    gaps = np.abs(np.abs(values[found] - x) - np.abs(values[wanted] - x))
    assert (found != wanted).mean() < 1e-3
    np.testing.assert_array_less(gaps, 1e-6 * np.abs(x) + 1e-12)


def test_what_is_divided_by_becomes_zero_only_where_it_is():
    x = jnp.asarray([0.0, 1e-30, 1e-9, 0.3e-6])
    assert encode_unit(x, False).tolist() == [0, 1, 1, 1]
    assert encode_unit(x, False, jnp.full(4, 0.999)).tolist() == [0, 1, 1, 1]
    assert encode_unit(x, True).tolist() == [127, 127, 127, 128]


@BOTH
def test_what_is_outside_counts_as_the_nearest_end(signed):
    ends = encode_unit(jnp.asarray([-1.5, 1.5]), signed)
    assert ends.tolist() == [0, 255]


@pytest.mark.slow
@BOTH
def test_the_mean_of_stochastic_rounding_is_the_number(signed):
    values = dynamic_map(signed)
    x = jnp.asarray(np.concatenate([(values[1:] + values[:-1]) / 2, 0.3 * values[2:] + 0.7 * values[1:-1]]))
    x = x[x > (0 if signed else values[1])] if not signed else x
    n = 4000
    noise = jax.random.uniform(KEY, (n, x.size))
    decoded = decode_unit(encode_unit(jnp.broadcast_to(x, noise.shape), signed, noise), signed)
    assert (jnp.stack([decoded.min(0) <= x, decoded.max(0) >= x])).all()
    gap = decoded.max(0) - decoded.min(0)
    # The deviation of a mean of n of two numbers is at most gap / 2 / sqrt(n).
    np.testing.assert_array_less(jnp.abs(decoded.mean(0) - x), 5 * gap / 2 / n**0.5 + 1e-7 * jnp.abs(x))
    assert len(np.unique(np.asarray(decoded[:, 100]))) == 2
