"""Structured feed-forward layers: their dense images, counts, and the guide's schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.core import tree
from peftjax.methods.structured.structured_ffn import Structured
from peftjax.testing.weights import check_weight
from peftjax.weights.functional import Functional
from peftjax.weights.layout import Layout

N, M, B = 12, 8, 4
PARAMS = {"up": {"kernel": normal(KEY, (N, M))}}
X = normal(jax.random.key(1), (5, N))
PATH = "up/kernel"
FORMS = ("low_rank", "block_dense", "block_shuffle")


def forward(params, x):
    return x @ params["up"]["kernel"]


def options_of(form, **options):
    return {"form": form, "rank": 4, "blocks": B, **options}


def started(form, **options):
    method = pj.structured_ffn(**options_of(form, **options))
    return (method, *method.init(KEY, PARAMS))


def block_diagonal(blocks):
    b, p, q = blocks.shape
    whole = np.zeros((b * p, b * q))
    for k, block in enumerate(np.asarray(blocks)):
        whole[k * p : (k + 1) * p, k * q : (k + 1) * q] = block
    return whole


def image(form, slots):
    """The matrix of f, by its definition."""
    first, second = slots["first"], slots["second"]
    if form == "low_rank":
        return np.asarray(first @ second)
    if form == "block_dense":
        return block_diagonal(first) @ np.asarray(second)
    inner, b = first.shape[0] * first.shape[2], len(second)
    into = np.zeros((inner, inner))
    for t in range(inner):
        into[t, (t % b) * (inner // b) + t // b] = 1.0
    out = np.zeros((M, M))
    for k in range(b):
        for s in range(M // b):
            out[k * (M // b) + s, s * b + k] = 1.0
    return block_diagonal(first) @ into @ block_diagonal(second) @ out


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_its_dense_image(form):
    method, frozen, fresh = started(form)
    wanted = image(form, fresh[PATH])
    got = pj.adapt(forward)(method.apply(frozen, fresh), X)
    np.testing.assert_allclose(got, X @ wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(method.merge(frozen, fresh)["up"]["kernel"], wanted, rtol=1e-4, atol=1e-5)
    if form != "block_shuffle":
        assert np.linalg.matrix_rank(wanted, 1e-4) == 4


def test_one_block_is_a_product_of_dense_matrices():
    dense, shuffled = (started(form, blocks=1)[2][PATH] for form in ("block_dense", "block_shuffle"))
    for form, own in (("block_dense", dense), ("block_shuffle", shuffled)):
        first = own["first"][0]
        second = own["second"] if form == "block_dense" else own["second"][0]
        np.testing.assert_allclose(Structured(form)(own, X), X @ first @ second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["block_shuffle"])
def test_a_model_may_use_it_as_the_array_it_stands_for(form):
    slots = started(form)[2][PATH]
    check_weight(Functional(slots, Layout.parse("io", (N, M)), Structured(form), "float32"))


def test_starts():
    _, _, spectral = started("low_rank")
    u, sizes, vt = np.linalg.svd(np.asarray(PARAMS["up"]["kernel"]))
    np.testing.assert_allclose(image("low_rank", spectral[PATH]), (u[:, :4] * sizes[:4]) @ vt[:4], atol=1e-4)
    first = started("block_shuffle", start="orthogonal")[2][PATH]["first"]
    np.testing.assert_allclose(
        jnp.einsum("lpq,lpr->lqr", first, first), np.tile(np.eye(2), (B, 1, 1)), atol=1e-5
    )


@pytest.mark.parametrize(
    ("form", "rank", "blocks"), [("low_rank", 192, 1), ("block_dense", 256, 2), ("block_shuffle", 1, 4)]
)
def test_a_third_of_the_numbers_as_published(form, rank, blocks):
    params = {"up": {"kernel": jnp.zeros((768, 3072))}, "down": {"kernel": jnp.zeros((3072, 768))}}
    method = pj.structured_ffn(form=form, rank=rank, blocks=blocks)
    count = tree.count(jax.eval_shape(method.init, KEY, params)[1])
    wanted = {
        "low_rank": 2 * 192 * 3840,
        "block_dense": 2 * 256 * 3840 - 128 * 3840,
        "block_shuffle": 2 * (768 * 768 + 768 * 3072) // 4,
    }
    assert count == wanted[form]
    assert round(count / 1e6, 2) == 1.47


@pytest.mark.parametrize("form", FORMS)
def test_the_guide_starts_as_the_layer_and_its_share_falls(form):
    method, frozen, fresh = started(form, guide_steps=4)
    trainable = {PATH: {**noisy(fresh)[PATH]}}
    tx = method.optimizer(optax.sgd(1.0))
    state, at = tx.init(fresh), {}
    for step in (0, 1, 2, 4):
        own = method.advance(None, frozen, fresh, state, step=step, key=KEY, tx=tx)[0]
        at[step] = own
        share = 0.5 * (1 + np.cos(np.pi * step / 4))
        np.testing.assert_allclose(own.state[PATH]["share"], share, atol=1e-6)
        # At first the share does not matter.
        np.testing.assert_allclose(
            method.merge(own, fresh)["up"]["kernel"], image(form, fresh[PATH]), rtol=1e-4, atol=1e-5
        )
    mixed = at[1].state[PATH]["share"] * trainable[PATH]["guide"]
    mixed += (1 - at[1].state[PATH]["share"]) * image(form, trainable[PATH])
    got = pj.adapt(forward)(method.apply(at[1], trainable), X)
    np.testing.assert_allclose(got, X @ mixed, rtol=1e-3, atol=1e-4)
    # In the end the method without it, given the same numbers, is the same.
    lean = pj.structured_ffn(**options_of(form))
    left = {PATH: {name: own for name, own in trainable[PATH].items() if name != "guide"}}
    rest = lean.init(KEY, PARAMS)[0]
    np.testing.assert_allclose(
        lean.merge(rest, left)["up"]["kernel"], method.merge(at[4], trainable)["up"]["kernel"], atol=1e-5
    )


def test_the_gradient_of_the_guide_is_its_share():
    method, frozen, fresh = started("block_dense", guide_steps=4, guide_shape="linear")
    tx = method.optimizer(optax.sgd(1.0))
    frozen = method.advance(None, frozen, fresh, tx.init(fresh), step=1, key=KEY, tx=tx)[0]
    assert frozen.state[PATH]["share"] == 0.75
    grads = jax.grad(lambda t: jnp.sum(pj.adapt(forward)(method.apply(frozen, t), X) ** 2))(fresh)[PATH]
    g = 2 * X @ image("block_dense", fresh[PATH])
    np.testing.assert_allclose(grads["guide"], 0.75 * X.T @ g, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        grads["second"], 0.25 * (X @ block_diagonal(fresh[PATH]["first"])).T @ g, rtol=1e-3, atol=1e-4
    )
    first = dataclasses.replace(frozen, state={PATH: {"share": jnp.ones(())}})
    none = jax.grad(lambda t: jnp.sum(pj.adapt(forward)(method.apply(first, t), X)))(fresh)[PATH]
    assert not none["first"].any()


def test_what_does_not_fit_says_so():
    with pytest.raises(pj.PeftError, match="rank 9 is larger than 'up/kernel', a matrix of 12 x 8"):
        started("low_rank", rank=9)
    with pytest.raises(pj.PeftError, match="3 blocks do not divide 12 and 8, of 'up/kernel'"):
        started("block_shuffle", blocks=3)
    with pytest.raises(pj.PeftError, match="start 'spectral' is of the form 'low_rank'"):
        pj.structured_ffn(form="block_dense", start="spectral")
