"""Sums of binaries: the fit of each group, its codes, and weights of them."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.quantize.binary_sums import BinarySum, fit_scales, nearest
from peftjax.quantize.encoding import encode
from peftjax.quantize.formats import FORMATS, describe
from peftjax.quantize.groups import BinaryCodes, Format

NORMAL = np.random.default_rng(0).standard_normal((6, 80)).astype(np.float32)
ROUNDS = (0, 2, 20)


@jax.jit
def fitted(x):
    """The codes of one and of three binaries, and of these after each number of rounds."""
    formats = {bits: Format(BinarySum(bits), group=32) for bits in (1, 3)}
    turns = {rounds: Format(BinarySum(3, rounds), group=32) for rounds in ROUNDS}
    return jax.tree.map(
        lambda form: (lambda codes: (codes, codes.decode()))(encode(x, form)),
        (formats, turns, Format(BinarySum(3), group=32, scales="e8m0")),
        is_leaf=lambda node: isinstance(node, Format),
    )


def by_group(x):
    """The numbers of each group, of which a row's last one is short."""
    return np.split(np.asarray(x, np.float64), [32, 64], axis=-1)


def errors(x, y):
    return np.stack([((a - b) ** 2).sum(-1) for a, b in zip(by_group(x), by_group(y))], -1)


def test_one_binary_is_the_sign_and_the_mean_size():
    """The optimum; 0 counts as positive, and what fills the last group up counts for nothing."""
    x = NORMAL.copy()
    x[0, 3] = 0
    codes, found = fitted(x)[0][1]
    wanted = [np.where(part >= 0, 1, -1) * np.abs(part).mean(-1, keepdims=True) for part in by_group(x)]
    np.testing.assert_allclose(found, np.concatenate(wanted, -1), rtol=1e-5)
    assert isinstance(codes, BinaryCodes)
    assert found[0, 3] > 0


def test_scales_fall_and_each_number_takes_the_nearest_sum():
    for bits, (codes, found) in fitted(NORMAL)[0].items():
        scales = np.asarray(codes.scales).reshape(6, 3, bits)
        assert (np.diff(scales, axis=-1) <= 0).all()
        assert (scales >= 0).all()
        signs = np.array(list(itertools.product((-1, 1), repeat=bits)))
        for at, part in enumerate(by_group(NORMAL)):
            totals = scales[:, at] @ signs.T
            closest = np.abs(part[..., None] - totals[:, None]).min(-1)
            np.testing.assert_allclose(np.abs(part - by_group(found)[at]), closest, atol=1e-6)
        near = nearest(jnp.asarray(NORMAL[:, :32]), jnp.asarray(scales[:, 0]))
        np.testing.assert_allclose(
            np.sum(signs[np.asarray(near)] * scales[:, :1], -1),
            np.asarray(found)[:, :32],
            rtol=1e-5,
            atol=1e-6,
        )


def test_no_round_makes_an_error_larger_and_scales_are_a_least_squares_fit():
    turns = fitted(NORMAL)[1]
    of_rounds = np.stack([errors(NORMAL, turns[rounds][1]) for rounds in ROUNDS])
    assert (np.diff(of_rounds, axis=0) <= 1e-5).all()
    assert of_rounds[-1].sum() < 0.8 * of_rounds[0].sum()
    codes, found = turns[20]
    part, scales = NORMAL[0, :32].astype(np.float64), np.asarray(codes.scales)[0, :3]
    signs = np.array(list(itertools.product((-1, 1), repeat=3)))
    chosen = signs[np.abs(np.asarray(found)[0, :32, None] - signs @ scales).argmin(-1)]
    best = np.linalg.lstsq(chosen, part, rcond=None)[0]
    assert ((part - chosen @ scales) ** 2).sum() < 1.02 * ((part - chosen @ best) ** 2).sum()


def test_powers_of_two():
    codes, found = fitted(NORMAL)[2]
    scales = np.asarray(codes.scales.decode())
    assert (np.log2(scales) % 1 == 0).all()
    floats = np.asarray(fitted(NORMAL)[0][3][0].scales)
    assert (np.abs(np.log2(scales / floats)) <= 0.5001).all()
    assert codes.scales.codes.dtype == jnp.uint8
    assert errors(NORMAL, found).sum() >= errors(NORMAL, fitted(NORMAL)[0][3][1]).sum()


def test_groups_of_zeros_and_of_one_number_are_exact():
    x = NORMAL.copy()
    x[0], x[1] = 0, -2.5
    formats, _, powers = fitted(x)
    for _, found in (*formats.values(), powers):
        np.testing.assert_allclose(found[0], 0, atol=1e-30)
    for _, found in formats.values():
        np.testing.assert_allclose(found[1], -2.5, rtol=1e-4)
    valid = jnp.ones((1, 8))
    two = fit_scales(jnp.array([[1.0, 3, -1, -3, 3, 1, -3, -1]]), valid, BinarySum(2))
    np.testing.assert_allclose(two, [[2, 1]], rtol=1e-5)


@pytest.mark.slow
def test_rows_places_and_whole_groups_are_read_from_their_own_codes():
    codes, found = fitted(NORMAL)[0][1]
    rows, places = jnp.array([4, 0]), jnp.array([3, 70])
    np.testing.assert_allclose(codes.take(rows).decode(), found[rows], rtol=1e-6)
    np.testing.assert_allclose(codes.at(places), found[:, places].T, rtol=1e-6)
    np.testing.assert_allclose(codes.cut(32, 80).decode(), found[:, 32:], rtol=1e-6)
    assert codes.cut(16, 80) is None
    three, found = fitted(NORMAL)[0][3]
    np.testing.assert_allclose(three.at(places), found[:, places].T, rtol=1e-6)
    assert three.codes.shape == (6, 80 * 3 // 8)
    assert three.scales.shape == (6, 9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bcq2", "bcq3"])
def test_a_base_of_them_carries_a_lora_and_its_words_are_looked_up(name):
    params = {
        "words": {"embedding": jnp.asarray(NORMAL[:, :64])},
        "up": {"kernel": jax.random.normal(KEY, (64, 12))},
    }
    base = pj.quantized(format=name, group=32, targets=["embedding", "kernel"], scales="float16")
    method = pj.chain(base, pj.lora(rank=2))
    frozen, trainable = method.init(KEY, params)
    dense = method.merge(frozen, trainable)
    assert np.abs(np.asarray(dense["up"]["kernel"]) - params["up"]["kernel"]).max() > 0.05

    def model(params, tokens):
        rows = params["words"]["embedding"][tokens]
        return rows @ params["up"]["kernel"], rows @ params["words"]["embedding"][:, :64].T

    tokens = jnp.array([[5, 0], [2, 5]])
    assert_close(pj.adapt(model)(method.apply(frozen, trainable), tokens), model(dense, tokens))
    again, found = method.merge(frozen, trainable, keep_dense=False)
    assert isinstance(again["words"]["embedding"].codes, BinaryCodes)
    # What is coded already is not found again exactly: fits of signs and scales in turn have many ends.
    assert found["up/kernel"].of_weight < (1e-3 if name == "bcq2" else 0.15)


def test_errors_name_the_option():
    assert describe(FORMATS["bcq3"]).startswith("bcq3 of 20 rounds")
    assert replace(FORMATS["bcq2"], element=BinarySum(2, 5)) == pj_form(format="bcq2", rounds=5)
    for options, message in (
        ({"format": "bcq2", "search": 4}, "bcq2 tries no ranges"),
        ({"format": "int4", "rounds": 4}, "int4 is not fitted in turns"),
        ({"format": "bcq2", "affine": True}, "bcq2 has no zero point"),
        ({"format": "bcq2", "train": True, "anneal": 0.005}, "bcq2 has several"),
    ):
        with pytest.raises(PeftError, match=message):
            pj.quantized(**options)
    with pytest.raises(PeftError, match="'up' has several scales"):
        pj.chain(pj.quantized(format="bcq2", targets="up"), pj.peqa(targets="up")).init(
            KEY, {"up": jnp.asarray(NORMAL)}
        )


def pj_form(**options):
    """The format that `quantized` makes of its options."""
    frozen, _ = pj.quantized(**options, targets="up").init(KEY, {"up": jnp.asarray(NORMAL)})
    return frozen.params["up"].codes.format
