"""OFQ: StatsQ's formats, and annealing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.quantize.encoding import encode
from peftjax.quantize.formats import FORMATS
from peftjax.weights.rounded import with_codes

W = jax.random.normal(KEY, (48, 6))
PARAMS = {"w": W}
X = jax.random.normal(KEY, (5, 48))


def statsq(w, bits):
    """The equations of the paper for rows `[m, n]` in float64, the whole numbers cut as well."""
    w, k = np.asarray(w, np.float64), 2 ** (bits - 1)
    s = 2 * np.abs(w).mean(-1, keepdims=True)
    c = np.clip(w / s, -1, 1 - 1e-6)
    return s * (np.clip(np.round(k * c - 0.5), -k, k - 1) + 0.5) / k, s[:, 0], k


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_half_whole_numbers_of_twice_the_mean_size(bits):
    x = np.concatenate([np.asarray(W.T), 3 * np.asarray(W.T)])
    x[0, :5] = [8, -8, 0, 1e-3, -1e-3]
    decode = jax.jit(lambda x: encode(x, FORMATS[f"statsq{bits}"]).decode())
    got = np.asarray(decode(x))
    wanted, s, k = statsq(x, bits)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    levels = {float(v) for v in np.round(got / s[:, None] * k, 3).ravel()}
    assert levels == {n + 0.5 for n in range(-k, k)}
    np.testing.assert_array_equal(decode(4 * x), 4 * got)


def test_a_last_group_that_is_short_has_its_own_mean():
    form = pj.quantized(format="statsq4", group=10).config
    made = pj.quantized(**{"format": form["format"], "group": form["group"]}).init(KEY, PARAMS)[0].params["w"]
    want = [2 * np.abs(np.asarray(W)[n : n + 10]).mean(0) / 8 for n in range(0, 48, 10)]
    np.testing.assert_allclose(made.codes.scales, np.array(want).T, rtol=1e-6)


def test_the_gradient_is_that_of_the_weights_themselves_and_the_codes_are_what_is_trained_on():
    method = pj.quantized(format="statsq2", train=True, targets="w")
    frozen, trainable = method.init(KEY, PARAMS)

    @jax.jit
    def found(trainable, x):
        applied = method.apply(frozen, trainable)
        run = pj.adapt(lambda p: jnp.sum(jnp.sin(x @ p["w"])))
        gradient = jax.grad(lambda t: run(method.apply(frozen, t)))(trainable)
        return gradient["w"], applied["w"].dense(), with_codes(applied)["w"].dense()

    gradient, weight, decoded = found(trainable, X)
    np.testing.assert_array_equal(weight, decoded)
    np.testing.assert_allclose(weight, statsq(W.T, 2)[0].T, rtol=1e-5)
    np.testing.assert_allclose(gradient, X.T @ jnp.cos(X @ weight), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_annealing_moves_what_is_near_two_codes_and_nothing_else():
    """By weight decay and moments too; the fraction that moves goes to zero with the share."""
    k, moved = 8, []
    w = W.at[0, 0].set(-0.0)
    for share in (0.25, 0.05, 1e-6):
        method = pj.quantized(format="statsq4", train=True, anneal=share, targets="w")

        def loss(params, x):
            return jnp.sum(jnp.sin(pj.adapt(lambda p, x: x @ p["w"])(params, x)))

        train = pj.training(method, loss, optax.adamw(1e-3, weight_decay=1.0))
        state = train.start(KEY, {"w": w})
        for _ in range(2 if share == 0.25 else 1):
            old = np.asarray(state.trainable["w"])
            state, _ = train.step(state, X)
            new = np.asarray(state.trainable["w"])
            t = k * np.clip(old / (2 * np.abs(old).mean(0)), -1, 1 - 1e-6)
            near = (np.abs(t - np.round(t)) <= share) & (np.abs(np.round(t)) < k)
            same = old.view(np.uint32) == new.view(np.uint32)
            assert (same == ~near).mean() > 0.99  # but for rounding at the edge itself
            assert same[~near].mean() > 0.99
            assert 0.0 < near.mean() < 0.7 or share == 1e-6
        moved.append((~same).mean())
    assert moved[0] > 3 * moved[1] > 0
    assert moved[2] < 0.01


def test_annealing_is_of_weights_that_are_trained():
    with pytest.raises(PeftError, match="train=True"):
        pj.quantized(anneal=0.01)
    chained = pj.chain(pj.lora(rank=2, targets="w"), pj.quantized(train=True, anneal=0.01, targets="w"))
    with pytest.raises(PeftError, match="earlier method"):
        chained.init(KEY, PARAMS)
