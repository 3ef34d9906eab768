"""Experts that a router chooses or mixes before they are used: equal to the merged model, and thin."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import KEY, assert_close, assert_equals_merged, assert_no_dense_gradient, noisy, normal, quick_at

import peftjax as pj

T, E, D, F = 4, 3, 12, 10
X = normal(KEY, (T, D))
W = normal(KEY, (E, D, F))
HOT = jax.nn.one_hot(jnp.array([0, 1, 2, 1]), E)
SQUARES = normal(KEY, (2, E, D, D))
KERNELS, SERIES = normal(KEY, (E, 3, D, F)), normal(KEY, (T, 5, D))
TABLES = normal(KEY, (E, D, F))


def soft(x):
    """Coefficients that depend on x: the router is trained through them."""
    return jax.nn.softmax(x[..., :E] * 2.0)


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def einsum(text, *operands, **options):
    return jnp.einsum(text, *operands, **options)


USES = {
    "one einsum": (W, "sio", lambda w, x: einsum("td,te,edf->tf", x, soft(x), w), X),
    "one einsum, left to right": (
        W,
        "sio",
        lambda w, x: einsum("td,te,edf->tf", x, soft(x), w, optimize=[(0, 1), (0, 1)]),
        X,
    ),
    "one einsum, outputs last": (W, "soi", lambda w, x: einsum("tf,te,edf->td", x[:, :F], soft(x), w), X),
    "summed experts of each": (W, "sio", lambda w, x: einsum("ted,edf->tf", jnp.stack([x, -x, x], 1), w), X),
    "weights first": (W, "sio", lambda w, x: einsum("edf,ted->ft", w, jnp.stack([x, -x, x], 1)), X),
    "one-hot": (W, "sio", lambda w, x: einsum("td,tdf->tf", x, einsum("te,edf->tdf", HOT, w)), X),
    "mixed for each": (W, "sio", lambda w, x: einsum("td,tdf->tf", x, einsum("te,edf->tdf", soft(x), w)), X),
    "mixed for each, axes behind": (
        W,
        "sio",
        lambda w, x: einsum("td,dft->tf", x, einsum("edf,te->dft", w, soft(x))),
        X,
    ),
    "mixed for all pairs": (
        W,
        "sio",
        lambda w, x: einsum("sd,tdf->sft", x, einsum("te,edf->tdf", soft(x), w)),
        X,
    ),
    "by vmap": (W, "sio", lambda w, x: jax.vmap(lambda x: x @ einsum("e,edf->df", soft(x), w))(x), X),
    "soft merge": (W, "sio", lambda w, x: x @ einsum("e,edf->df", soft(x).mean(0), w), X),
    "soft merge, transposed and cut": (
        W,
        "sio",
        lambda w, x: x[:, : F - 1] @ einsum("e,edf->df", soft(x).mean(0), w).T[1:],
        X,
    ),
    "soft merge into heads": (
        W,
        "sio",
        lambda w, x: einsum("td,dhk->thk", x, einsum("e,edf->df", soft(x).mean(0), w).reshape(D, 2, F // 2)),
        X,
    ),
    "mean": (W, "sio", lambda w, x: x @ w.mean(0), X),
    "a scaled stack": (W, "sio", lambda w, x: einsum("td,te,edf->tf", x, soft(x), 0.5 * w), X),
    "layers in a scan": (
        SQUARES,
        "ssio",
        lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ einsum("e,edf->df", soft(c)[0], w)), None), x, w)[0],
        X,
    ),
    "soft merge of a layer's experts": (
        SQUARES,
        "ssio",
        lambda w, x: jnp.tanh(x @ einsum("e,ledf->ldf", soft(x)[0], w)[1]),
        X,
    ),
    "kernels": (KERNELS, "siio", lambda w, x: conv(x, einsum("e,ewio->wio", soft(x)[0, 0], w)), SERIES),
    "a kernel for each": (
        KERNELS,
        "siio",
        lambda w, x: jax.vmap(lambda x: conv(x[None], einsum("e,ewio->wio", soft(x)[0], w)))(x),
        SERIES,
    ),
    "tables": (
        TABLES,
        "sio",
        lambda w, x: einsum("e,evf->vf", soft(x)[0], w)[jnp.array([[1, 7], [0, 0]])],
        X,
    ),
}


@pytest.mark.parametrize("name", quick_at(USES, every=3))
def test_mixed_experts(name):
    w, letters, use, x = USES[name]
    method = pj.lora(rank=2, targets=".*", layouts={"w": letters})
    assert_equals_merged(lambda p, x: use(p["w"], x), {"w": w}, method, x, tolerance=1e-4)
    assert_no_dense_gradient(lambda p, x: use(p["w"], x), {"w": w}, method, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["one einsum", "one-hot", "soft merge, transposed and cut", "mean", "tables", "kernels"]
)
@pytest.mark.parametrize("method", [pj.dora, pj.paca, pj.snell])
def test_mixed_experts_of_other_methods(method, name):
    w, letters, use, x = USES[name]
    if method is pj.dora and "cut" in name:
        use = USES["soft merge"][2]
    method = method(rank=2, targets=".*", layouts={"w": letters})
    frozen, trainable = method.init(KEY, {"w": w})
    trainable = jax.tree.map(
        lambda t: noisy(t) if jnp.issubdtype(t.dtype, jnp.floating) else t,
        trainable,
    )
    got = pj.adapt(use)(method.apply(frozen, trainable)["w"], x)
    assert_close(got, use(method.merge(frozen, trainable)["w"], x), 1e-4)


def test_a_mixture_that_leaves_a_loop_says_so():
    method = pj.lora(rank=2, targets=".*", layouts={"w": "sio"})
    weights = method.apply(*method.init(KEY, {"w": W}))

    def use(p):
        return lax.scan(lambda c, x: (c, einsum("e,edf->df", soft(x), p["w"])), 0.0, X)[1]

    with pytest.raises(pj.PeftError, match="mix it where it is used"):
        pj.adapt(use)(weights)
