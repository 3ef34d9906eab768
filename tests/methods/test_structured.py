"""Structured methods against the dense matrices that they stand for, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.structured._locations import locations
from peftjax.methods.structured.boft import shuffled
from peftjax.methods.structured.lokr import factors_of
from peftjax.testing.model import moved
from peftjax.weights.base import dense

W = jax.random.normal(KEY, (12, 8))


def changed(method):
    """The base, the trained arrays, far from their start, and the weight that they make."""
    frozen, trainable = method.init(KEY, {"w": W})
    trainable = moved(trainable)
    return (
        np.asarray(W),
        jax.tree.map(np.asarray, trainable["w"]),
        dense(method.apply(frozen, trainable)["w"]),
    )


@pytest.mark.parametrize(
    ("size", "factor", "wanted"),
    [
        (256, None, (16, 16)),
        (128, None, (8, 16)),
        (127, None, (1, 127)),
        (128, 4, (4, 32)),
        (4, 4, (4, 1)),
        (12, 5, (3, 4)),
    ],
)
def test_lokr_cuts_a_size_in_two(size, factor, wanted):
    assert factors_of(size, factor) == wanted


def test_lokr_is_a_kronecker_product():
    w, own, got = changed(pj.lokr(rank=1, alpha=3.0, targets="w", decompose_both=True))
    first = own["w1"] if "w1" in own else own["a1"].T @ own["b1"]
    second = own["w2"] if "w2" in own else own["a2"].T @ own["b2"]
    np.testing.assert_allclose(got, w + 3.0 * np.kron(first, second), atol=1e-5)


def test_hra_reflects_in_one_hyperplane_after_the_other():
    w, own, got = changed(pj.hra(rank=4, targets="w"))
    wanted = w.T
    for u in own["u"]:
        wanted = wanted - 2 * np.outer(wanted @ u, u) / (u @ u)
    np.testing.assert_allclose(got.T, wanted, atol=1e-5)


def test_orthogonal_reflections_are_undone_at_first():
    method = pj.hra(rank=3, orthogonal=True, targets="w")
    np.testing.assert_allclose(dense(method.apply(*method.init(KEY, {"w": W}))["w"]), W, atol=1e-5)


def test_boft_shuffles_halves_of_blocks():
    assert shuffled(8, 2, 0).tolist() == list(range(8))
    assert shuffled(8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert shuffled(8, 2, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_boft_keeps_lengths_but_for_the_scale():
    w, own, got = changed(pj.boft(block=2, rounds=2, targets="w"))
    np.testing.assert_allclose(
        np.linalg.norm(got, axis=0), np.linalg.norm(w, axis=0) * np.abs(own["scale"]), rtol=1e-5
    )


def test_c3a_is_made_of_circulant_blocks():
    w, own, got = changed(pj.c3a(block=4, targets="w"))
    order = (np.arange(4)[:, None] - np.arange(4)) % 4
    blocks = own["kernel"][:, :, order].transpose(0, 2, 1, 3).reshape(12, 8)
    np.testing.assert_allclose(got, w + blocks / 12, atol=1e-5)


def test_fourierft_is_an_inverse_transform():
    w, own, got = changed(pj.fourierft(count=96, scale=2.0, targets="w"))
    places = np.unravel_index(locations(777, 96, 96), (8, 12))
    spectrum = np.zeros((8, 12))
    spectrum[places] = own["spectrum"]
    np.testing.assert_allclose(got, w + 2.0 * np.fft.ifft2(spectrum).real.T, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (pj.hra(rank=3, targets="w"), "rank 3 of 'w' is odd"),
        (pj.boft(block=4, rounds=3, targets="w"), "do not divide the 12 inputs of 'w'"),
        (pj.c3a(block=6, targets="w"), "blocks of 6 do not divide 'w', a matrix of 12 x 8"),
        (pj.road(group=6, targets="w"), "groups of 6 do not divide the 8 outputs of 'w'"),
        (pj.gralora(rank=3, targets="w"), "2 blocks do not divide rank 3 or 'w'"),
        (pj.bone(rank=3, targets="w"), "blocks of 3 do not divide 'w'"),
        (pj.supertuning(sparsity=0.999, targets="w"), "leaves no entry of 'w'"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_does_not_fit_is_named(method, said):
    with pytest.raises(PeftError, match=said):
        method.init(KEY, {"w": W})


def test_a_bias_that_no_module_has_is_not_merged():
    method = pj.beft(targets="w")
    frozen, trainable = method.init(KEY, {"w": W})
    np.testing.assert_allclose(
        jax.jit(pj.adapt(lambda params, x: x @ params["w"]))(
            method.apply(frozen, moved(trainable)), jnp.ones((2, 12))
        ),
        jnp.ones((2, 12)) @ W + moved(trainable)["w"]["shift"],
        atol=1e-5,
    )
    with pytest.raises(PeftError, match="cannot be merged"):
        method.merge(frozen, trainable)
