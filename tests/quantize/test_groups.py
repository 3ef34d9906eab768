"""Codes of weights: what the formats promise, and the numbers of bitsandbytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.scipy.special import ndtri
from support import all_but_slow, quick_at

from peftjax.core import tree
from peftjax.quantize.elements import E2M1, NF4, Natural, Table
from peftjax.quantize.encoding import encode
from peftjax.quantize.formats import FORMATS
from peftjax.quantize.groups import Format
from peftjax.quantize.packing import pack, packed_bytes, unpack

NORMAL = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
DOUBLE = replace(FORMATS["nf4"], scales="double")

# bitsandbytes 0.50.2, `quantize_4bit` of `tensor()` with blocks of 64, on a CPU.
GOLDEN = {
    "nf4": "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d"
    "18e2a04c16e29f3b05d17e29f3c05d181c40a2e81d60c4fa2e71d50b3f92e71c40b3e81d61c4fa2e81d50b3f92e71d50",
    "fp4": "bf5a92a63c4be5a02d63c4be2a12d73f5a92a63d4bf5a92d63c4be5a12d73c5be2a63d4bf5a92d63c4be5a12d73c5be2"
    "a12d7bf5a92a63c4be5a02d63c4be2a1a5fb7d21a2eb5c37d21a5eb4c36d29a5fb4d36a2eb5c37d21a5eb4c36d29a5fb",
}
GOLDEN_SCALES = [1.0, 2.0, 0.029999999329447746]
GOLDEN_DOUBLE = ([96, 255, 0], 0.9900000095367432, 1.0099999904632568)


def tensor():
    w = np.array([((i * 37) % 101 - 50) / 50 * (1 + i // 64) for i in range(192)], np.float32).reshape(3, 64)
    w[2] *= np.float32(-0.01)
    return w


def coded(x, form):
    """The codes of an array, and what they decode to."""
    made = jax.jit(lambda x: (lambda codes: (codes, codes.decode()))(encode(x, form)))(x)
    return made[0], np.asarray(made[1])


def relative(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(x)


def test_the_table_of_nf4_is_that_of_its_construction():
    """Quantiles of a normal number: 8 above zero, 7 below."""
    offset = 0.9677083
    above = ndtri(jnp.linspace(offset, 0.5, 9)[:-1])
    below = -ndtri(jnp.linspace(offset, 0.5, 8)[:-1])
    built = np.sort(np.concatenate([above, below, [0.0]]))
    np.testing.assert_allclose(built / built.max(), NF4, atol=2e-7)


@pytest.mark.parametrize("name", GOLDEN)
def test_codes_and_scales_are_those_of_bitsandbytes(name):
    codes, _ = coded(tensor(), FORMATS[name])
    assert np.asarray(codes.codes).tobytes().hex() == GOLDEN[name]
    assert np.ravel(codes.scales).tolist() == GOLDEN_SCALES
    twice, _ = coded(tensor(), replace(FORMATS[name], scales="double"))
    assert np.asarray(twice.codes).tobytes().hex() == GOLDEN[name]
    found = (np.ravel(twice.scales.codes).tolist(), twice.scales.scale.item(), twice.scales.mean.item())
    assert found == GOLDEN_DOUBLE


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(64, 128), (48, 100), (7, 33), (64, 1024)])
@pytest.mark.parametrize("name", GOLDEN)
def test_bitsandbytes_gives_the_same(name, shape):
    """Codes and scales to the bit; of scales coded twice, those that its search puts at the nearest."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w = NORMAL.ravel()[: np.prod(shape)].reshape(shape).copy()
    w[0] = 0
    packed, state = functional.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type=name)
    mine, values = coded(w.reshape(1, -1), FORMATS[name])
    np.testing.assert_array_equal(np.ravel(mine.codes), packed.numpy().ravel())
    np.testing.assert_array_equal(np.ravel(mine.scales), state.absmax.numpy())
    np.testing.assert_array_equal(values.ravel(), functional.dequantize_4bit(packed, state).numpy().ravel())
    _, state = functional.quantize_4bit(
        torch.from_numpy(w), blocksize=64, compress_statistics=True, quant_type=name
    )
    twice, _ = coded(w.reshape(1, -1), replace(FORMATS[name], scales="double"))
    same = np.ravel(twice.scales.codes) == state.absmax.numpy()
    # The mean is a sum in another order, and its search misses the nearest by 1e-5 now and then.
    assert np.sum(~same) <= max(1, 0.005 * same.size)
    np.testing.assert_allclose(np.ravel(twice.scales.scale), state.state2.absmax.numpy(), rtol=1e-6)
    np.testing.assert_allclose(twice.scales.mean.item(), state.offset.item(), rtol=1e-6)


@pytest.mark.parametrize("bits", quick_at(range(1, 9), 3))
def test_packing_is_undone_for_every_byte_and_width(bits):
    if 8 % bits == 0:
        every = np.arange(256, dtype=np.uint8)
        np.testing.assert_array_equal(pack(unpack(every, bits, 256 * 8 // bits), bits), every)
    for width in (1, 7, 24) if bits < 7 else ():
        codes = np.random.default_rng(bits).integers(0, 2**bits, (2, width)).astype(np.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (2, packed_bytes(width, bits))
        np.testing.assert_array_equal(unpack(packed, bits, width), codes)


def test_the_first_code_is_in_the_high_bits_and_three_bits_fill_bytes():
    np.testing.assert_array_equal(unpack(np.uint8([0x1F]), 4, 2), [1, 15])
    assert packed_bytes(64, 3) == 24


def test_an_error_is_at_most_half_the_widest_gap_and_a_group_of_zeros_stays():
    x = NORMAL.copy()
    x[0, :64] = 0
    for form in (FORMATS["nf4"], DOUBLE, replace(DOUBLE, scales="double_float8")):
        codes, found = coded(x, form)
        share = (
            np.abs(found - x).reshape(64, -1, 64)
            / np.maximum(np.abs(x).reshape(64, -1, 64).max(-1), 1e-9)[..., None]
        )
        of_scales = {"float32": 0, "double": 0.008, "double_float8": 0.02}[form.scales]
        assert share.max() < 0.1519 + of_scales
        assert abs(relative(x, found) - 0.092) < 1e-3 or form.scales == "double_float8"
        np.testing.assert_array_equal(found[0, :64], 0)
    scales = np.asarray(codes.scales.decode())
    constant, found = coded(np.full((4, 256), 0.5, np.float32), DOUBLE)
    assert np.isfinite(scales).all()
    np.testing.assert_array_equal(found, 0.5)
    assert np.asarray(constant.scales.scale).max() == 0


def test_bits_a_number():
    """Counted in the arrays that are held."""
    rows = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    bits = {
        name: 8 * tree.nbytes(jax.eval_shape(lambda x, f=form: encode(x, f), rows)) / 4096**2
        for name, form in FORMATS.items()
    }
    assert {name: round(own, 3) for name, own in bits.items()} == {
        "nf4": 4.5, "fp4": 4.5, "int8": 8.008, "int4": 4.25, "int3": 3.5, "int2": 2.5,
        "fp8_e4m3": 8.008, "fp8_e5m2": 8.008, "mxfp4": 4.25, "nvfp4": 4.5, "power_of_two": 5.002,
        "bcq1": 1.25, "bcq2": 2.5, "bcq3": 3.75, "bcq4": 5.0,
        "statsq4": 4.008, "statsq3": 3.008, "statsq2": 2.008,
    }  # fmt: skip
    double = jax.eval_shape(lambda x: encode(x, DOUBLE), rows)
    assert tree.nbytes(double) == 4096**2 // 2 + 4096 * 64 + 4 * 4096 * 64 // 256 + 4
    assert round(8 * tree.nbytes(double) / 4096**2, 3) == 4.127


@pytest.mark.parametrize(
    "name",
    quick_at([n for n in FORMATS if n not in ("bcq1", "bcq3", "bcq4")] + ["bcq1", "bcq3", "bcq4"], every=3),
)
def test_what_is_decoded_has_the_same_codes_again(name):
    """And what the formats are worth on normal numbers: their relative errors, which the papers have too."""
    form = FORMATS[name]
    codes, found = coded(NORMAL, form)
    again, twice = coded(found, form)
    if form.search == 1 and form.range == "largest" and form.scales_a_group == 1:
        # Of others what is decoded has another mean, or other signs fit as well.
        np.testing.assert_allclose(twice, found, rtol=1e-6)
    golden = {
        "nf4": 0.092, "fp4": 0.121, "int8": 0.0081, "int4": 0.118, "int3": 0.21, "int2": 0.431,
        "fp8_e4m3": 0.026, "fp8_e5m2": 0.052, "mxfp4": 0.115, "nvfp4": 0.0956, "power_of_two": 0.209,
        "bcq1": 0.6, "bcq2": 0.338, "bcq3": 0.187, "bcq4": 0.104,
        "statsq4": 0.223, "statsq3": 0.267, "statsq2": 0.371,
    }[name]  # fmt: skip
    assert abs(relative(NORMAL, found) / golden - 1) < 0.06
    assert codes.codes.dtype in (jnp.uint8, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
    assert again.shape == NORMAL.shape


def test_bounds_of_each_kind_of_code():
    step = np.abs(NORMAL).max(-1, keepdims=True) / 127
    assert (np.abs(coded(NORMAL, FORMATS["int8"])[1] - NORMAL) <= step / 2 * (1 + 1e-5)).all()
    for name, mantissa in (("fp8_e4m3", 3), ("fp8_e5m2", 2)):
        codes, found = coded(NORMAL, FORMATS[name])
        normal = np.abs(NORMAL / np.asarray(codes.scales)) > 2.0**-6
        assert (np.abs(found - NORMAL) <= 2.0 ** -(mantissa + 1) * np.abs(NORMAL) * (1 + 1e-5))[normal].all()
    codes, found = coded(NORMAL, FORMATS["power_of_two"])
    inside = np.abs(NORMAL) > 2.0**-15 * np.asarray(codes.scales.decode())
    assert (np.abs(found / NORMAL - 1) <= 2**0.5 - 1 + 1e-5)[inside].all()
    assert (np.log2(np.abs(found)) % 1 == 0).all()
    affine = Format(Natural(4), group=64)
    codes, found = coded(NORMAL + 3, affine)
    assert (np.abs(found - NORMAL - 3) <= codes.by_number(codes.scales) * (1 + 1e-4)).all()
    assert relative(NORMAL + 3, found) < relative(NORMAL + 3, coded(NORMAL + 3, FORMATS["int4"])[1])


def test_the_float_of_four_bits_rounds_as_that_of_ml_dtypes():
    x = np.concatenate([np.linspace(-7, 7, 4001), np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])]).astype(
        np.float32
    )
    element = Table(E2M1, "even")
    want = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(element.decode(element.encode(x)), want)


def test_more_ranges_tried_never_give_a_larger_error():
    errors = [relative(NORMAL, coded(NORMAL, replace(FORMATS["int3"], search=n))[1]) for n in (1, 20)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", all_but_slow(["nf4", "int3", "nvfp4", "fp8_e4m3", "bcq2", "bcq3"], ["nf4"]))
def test_codes_of_blocks_of_rows_are_those_of_all_at_once(name):
    """Blocks that do not divide the rows, in groups and in rows, for a row that is none and many."""
    x = jnp.asarray(NORMAL[:12, :192]).reshape(3, 4, 192)
    form = replace(FORMATS[name], scales="double") if name == "nf4" else FORMATS[name]
    whole = jax.jit(lambda x: encode(x, form))(x)
    parts = jax.jit(lambda x: encode(x, form, block=1000))(x)
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
