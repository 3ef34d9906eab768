import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY

from peftjax.core.errors import PeftError
from peftjax.optim.rounding_noise import uniform
from peftjax.quantize import decode
from peftjax.quantize.blockwise import block_length, encode, merged_axes
from peftjax.quantize.dynamic_map import dynamic_map

BOTH = pytest.mark.parametrize("signed", [True, False])
SHAPES = [(3, 512), (5, 257), (2, 3, 11), (700,), (2, 4, 3, 100)]


def normal(shape, signed=True):
    x = jax.random.normal(KEY, shape) * jnp.exp(3 * jax.random.normal(jax.random.key(1), shape))
    return x if signed else x**2


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_half_a_gap_of_the_blocks_largest(shape, signed):
    x = normal(shape, signed)
    coded = encode(x, signed=signed)
    assert coded.shape == coded.codes.shape == shape
    error = np.abs(np.asarray(decode(coded) - x))
    # -1 is not in the signed map: what is there may be as far as the last of it.
    gap = np.diff(dynamic_map(signed)).max() / 2 if not signed else 1 - dynamic_map(True)[254]
    assert error.max() <= gap * 1.001 * np.abs(x).max()
    largest = np.unravel_index(np.abs(x).argmax(), shape)
    np.testing.assert_array_equal(decode(coded)[largest], x[largest])


@pytest.mark.slow
def test_each_block_has_its_own_scale_with_its_sign():
    x = jnp.zeros((2, 512)).at[0, 3].set(-2.0).at[0, 300].set(5.0).at[1, 511].set(1e-20)
    coded = encode(x, signed=True)
    np.testing.assert_array_equal(coded.scales, np.float32([[-2.0, 5.0], [0.0, 1e-20]]))
    np.testing.assert_array_equal(decode(coded), x)


@pytest.mark.slow
@BOTH
def test_coding_again_changes_nothing(signed):
    once = encode(normal((4, 300), signed), signed=signed)
    again = encode(decode(once), signed=signed)
    np.testing.assert_array_equal(once.codes, again.codes)
    np.testing.assert_array_equal(once.scales, again.scales)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_hidden(signed, bad):
    decoded = decode(encode(normal((2, 256), signed).at[0, 7].set(bad), signed=signed))
    assert jnp.isnan(decoded[0]).all()
    assert jnp.isfinite(decoded[1]).all()


@pytest.mark.parametrize(
    ("n", "length"), [(4096, 256), (11008, 172), (768, 192), (300, 150), (200, 200), (5461, 256), (257, 256)]
)
def test_lengths_of_blocks(n, length):
    assert block_length(n, 256) == length


@pytest.mark.slow
def test_short_rows_are_read_together():
    assert [merged_axes(shape, 256) for shape in [(9, 64), (9, 63), (9, 8, 7), (9, 8, 9)]] == [1, 2, 3, 2]
    assert encode(jnp.ones((9, 8, 9)), signed=True).scales.shape == (9, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "blocks"), [((8, 4096), 8 * 16), ((4, 11008), 4 * 64), ((3, 5461), 3 * 22)]
)
def test_bytes(shape, blocks):
    coded = encode(jnp.ones(shape), signed=True)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(coded)) == np.prod(shape) + 4 * blocks


def test_arguments():
    with pytest.raises(PeftError, match="a scalar has no blocks"):
        encode(jnp.zeros(()), signed=True)
    with pytest.raises(PeftError, match="at least 2, got 1"):
        encode(jnp.zeros(4), signed=True, block_size=1)


def test_noise_is_uniform_and_of_its_key_and_place():
    noise = np.asarray(uniform(KEY, (64, 1000)))
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = np.histogram(noise, 64, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 63 + 5 * (2 * 63) ** 0.5  # χ² of 63 degrees of freedom
    for a, b in (
        (noise[:-1], noise[1:]),
        (noise[:, :-1], noise[:, 1:]),
        (noise, uniform(jax.random.key(8), noise.shape)),
    ):
        assert abs(np.corrcoef(a.ravel(), np.ravel(b))[0, 1]) < 5 / a.size**0.5
    np.testing.assert_array_equal(noise, uniform(KEY, noise.shape))
