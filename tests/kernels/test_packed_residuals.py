"""Codes of residuals: how they are packed, how far off they are, and the kernels against the reference."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import KEY, all_but_slow, quick_at

from peftjax.core.errors import PeftError
from peftjax.kernels.packed_residuals import gpu, pack, reference, tpu, unpack
from peftjax.quantize import decode
from peftjax.quantize.affine import encode
from peftjax.quantize.grid import Grid

SHAPES = [(5, 37), (3, 130), (2, 9, 256), (7, 768), (130, 64), (1, 1)]


def array(shape, dtype=jnp.float32):
    return jax.random.normal(KEY, shape).astype(dtype)


def steps(x, code):
    """The step of each value's group."""
    count = code.step.shape[-1]
    per_group = -(-x.shape[-1] // count)
    step = jnp.repeat(code.step.astype(jnp.float32), per_group + per_group % 2, -1)
    return step[..., : x.shape[-1]]


@pytest.mark.parametrize(
    ("width", "group"), quick_at(itertools.product([130, 1, 2, 31, 37, 64, 65, 256], [64, 2, 48]), every=5)
)
def test_unpacking_undoes_packing(width, group):
    codes = jax.random.randint(KEY, (3, width), 0, 16)
    np.testing.assert_array_equal(unpack(pack(codes, group), width, group), codes)


@pytest.mark.parametrize(("width", "nbytes"), [(256, 128), (96, 48), (37, 19), (64, 32)])
def test_two_codes_take_a_byte(width, nbytes):
    code = encode(array((3, width)), 4)
    assert code.codes.shape == (3, nbytes)
    assert code.codes.dtype == jnp.uint8
    assert code.low.dtype == code.step.dtype == jnp.bfloat16
    assert code.low.shape == (3, -(-width // 64))


@pytest.mark.parametrize(
    ("shape", "offset", "dtype"),
    quick_at(itertools.product(SHAPES, [0.0, 100.0, -3.0], [jnp.float32, jnp.bfloat16]), every=8),
)
def test_a_code_is_half_a_step_off_at_most(shape, offset, dtype):
    x = (array(shape) + offset).astype(dtype)
    for bits, part in ((4, 2), (8, 30)):
        code = encode(x, bits)
        again = decode(code)
        assert (again.shape, again.dtype) == (x.shape, x.dtype)
        rounding = 2.0**-8 * jnp.abs(x.astype(jnp.float32)) if dtype == jnp.bfloat16 else 1e-4
        error = jnp.abs(again.astype(jnp.float32) - x.astype(jnp.float32))
        assert bool((error <= 1.02 * steps(x, code) / part + rounding).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_group_is_exact(bits):
    x = jnp.broadcast_to(jnp.array([[0.0], [1.25], [-3e4], [1e-30]], jnp.bfloat16), (4, 128))
    np.testing.assert_array_equal(decode(encode(x, bits)), x)
    float32 = jnp.full((2, 64), 1.2345678)
    np.testing.assert_allclose(decode(encode(float32, bits)), float32, rtol=2.0**-16)


def test_32_bits_are_the_array_itself():
    x = array((3, 5))
    assert encode(x, 32) is x
    assert decode(x) is x


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_at_random_is_right_on_average(bits):
    x = array((1, 64))
    draws = jax.vmap(lambda key: decode(encode(x, bits, key=key)))(jax.random.split(KEY, 4000))
    step = float(encode(x, bits).step[0, 0]) / (1 if bits == 4 else 15)
    inside = (x > x.min()) & (x < x.max())
    assert float(jnp.abs(jnp.where(inside, draws.mean(0) - x, 0)).max()) < 0.05 * step
    assert float(jnp.abs(draws[0] - draws[1]).max()) > 0.9 * step


def test_a_nan_stays_one():
    assert bool(jnp.isnan(decode(encode(jnp.full((2, 64), jnp.nan), 4))).all())


def test_the_grid_of_derivatives_holds_zero_and_one():
    grid = Grid(-2 / 12, 1 / 12)
    x = jnp.array([[0.0, 1.0, 5.0, -5.0, 0.51]])
    again = grid.decode(grid.encode(x), 5)
    np.testing.assert_allclose(again, [[0.0, 1.0, 13 / 12, -1 / 6, 0.5]], atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("body", [gpu, tpu])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", all_but_slow(SHAPES, ((5, 37), (3, 130), (1, 1))))
def test_kernels_interpreted_equal_the_reference(shape, dtype, body):
    x, width = array(shape, dtype), shape[-1]
    for fine in (False, True):
        want = reference.quantize(x, group=64, fine=fine)
        got = body.quantize(x, group=64, fine=fine, interpret=True)
        for left, right in zip(got, want, strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        back = body.dequantize(*got, width=width, dtype=dtype, interpret=True)
        plain = reference.dequantize(*want, width=width, dtype=dtype)
        # The compiler may fuse the product and the sum into one rounding.
        rtol = 1e-6 if dtype == jnp.float32 else 2.0**-7
        np.testing.assert_allclose(*(np.asarray(y[0], np.float32) for y in (back, plain)), rtol, 1e-6)


@pytest.mark.slow
def test_kernels_on_several_blocks_of_a_tpu():
    x = array((4, 2560))
    got = tpu.quantize(x, group=128, fine=False, interpret=True)
    for left, right in zip(got, reference.quantize(x, group=128, fine=False), strict=True):
        np.testing.assert_array_equal(left, right)


def test_vmap_and_a_shard_map():
    x = array((8, 4, 128))
    want = decode(encode(x, 8))
    np.testing.assert_array_equal(jax.vmap(lambda x: decode(encode(x, 8)), in_axes=1, out_axes=1)(x), want)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    local = partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    np.testing.assert_array_equal(jax.jit(local(lambda x: decode(encode(x, 8))))(x), want)


def test_explicit_axes_take_the_reference():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    x = array((4, 256))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, P("x")))
        np.testing.assert_array_equal(jax.jit(lambda x: decode(encode(x, 4)))(sharded), decode(encode(x, 4)))


@pytest.mark.parametrize(("bits", "group"), [(5, 64), (16, 64), (4, 1)])
def test_other_bits_and_groups_are_errors(bits, group):
    with pytest.raises(PeftError, match=r"bits|group"):
        encode(array((2, 4)), bits, group=group)
