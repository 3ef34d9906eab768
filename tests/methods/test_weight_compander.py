"""Weight Compander: its function, its gradients, and the limits of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.methods.structured.weight_compander import companded

PARAMS = {"up": {"kernel": normal(KEY, (6, 5)), "bias": jnp.zeros(5)}}
X = normal(jax.random.key(1), (8, 6))
PATH = "up/kernel"


def loss(params):
    return jnp.sum(jnp.sin(X @ params["up"]["kernel"] + params["up"]["bias"]))


def test_the_function_is_odd_increasing_bounded_and_steep_at_zero():
    raw = {"a": jnp.float32(0.3), "b": jnp.float32(-1.0)}
    a, b = (np.log1p(np.exp(float(n))) for n in raw.values())
    v = jnp.arange(-500, 501) / 10.0
    w = np.asarray(companded({"v": v, **raw}))
    np.testing.assert_allclose(w, -w[::-1], atol=1e-6)
    assert (np.diff(w) > 0).all()
    assert np.abs(w).max() < a * np.pi / 2
    slope = jax.grad(lambda v: companded({"v": v, **raw}))
    np.testing.assert_allclose(slope(0.0), a / b, rtol=1e-5)
    assert slope(0.0) > 1 > slope(3.0)


def test_gradients_are_the_formulas():
    method = pj.weight_compander(slope=3.0)
    frozen, fresh = method.init(KEY, PARAMS)
    trainable = noisy(fresh)
    got = jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t)))(trainable)
    own = {name: np.asarray(value, np.float64) for name, value in trainable[PATH].items()}
    a, b = np.log1p(np.exp(own["a"])), np.log1p(np.exp(own["b"]))
    da, db = (1 / (1 + np.exp(-own[name])) for name in "ab")
    dw = np.asarray(jax.grad(loss)(method.merge(frozen, trainable))["up"]["kernel"])
    v = own["v"]
    np.testing.assert_allclose(got[PATH]["v"], dw * (a / b) / (1 + (v / b) ** 2), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got[PATH]["a"], da * np.sum(dw * np.arctan(v / b)), rtol=1e-3)
    np.testing.assert_allclose(got[PATH]["b"], -db * np.sum(dw * a * v / (b**2 + v**2)), rtol=1e-3)


@pytest.mark.parametrize("learn", [True, False])
def test_it_starts_exactly_and_what_is_not_learned_is_state(learn):
    params = {"up": {"kernel": jnp.stack([PARAMS["up"]["kernel"], jnp.zeros((6, 5))])}}
    method = pj.weight_compander(headroom=0.7, learn=learn)
    frozen, fresh = method.init(KEY, params)
    np.testing.assert_allclose(method.merge(frozen, fresh)["up"]["kernel"], params["up"]["kernel"], atol=1e-6)
    assert set(fresh[PATH]) == ({"v", "a", "b"} if learn else {"v"})
    merged = method.merge(frozen, jax.tree.map(lambda leaf: leaf + 1e3, fresh) if not learn else fresh)
    limit = 0.7 * np.abs(PARAMS["up"]["kernel"]).max() * np.pi / 2
    assert np.abs(merged["up"]["kernel"][0]).max() <= limit * 1.0001


def test_a_wide_function_of_slope_1_trains_as_full_fine_tuning():
    wide, plain = pj.weight_compander(headroom=1e3, slope=1.0, learn=False), pj.full()
    found = []
    for method in (wide, plain):
        frozen, trainable = method.init(KEY, PARAMS)
        tx = method.optimizer(optax.sgd(0.1))
        state = tx.init(trainable)
        for _ in range(3):
            grads = jax.grad(lambda t, m=method, f=frozen: pj.adapt(loss)(m.apply(f, t)))(trainable)
            updates, state = tx.update(grads, state, trainable, frozen=frozen)
            trainable = optax.apply_updates(trainable, updates)
        found.append(method.merge(frozen, trainable))
    np.testing.assert_allclose(found[0]["up"]["kernel"], found[1]["up"]["kernel"], atol=1e-4)
    assert np.abs(found[1]["up"]["kernel"] - PARAMS["up"]["kernel"]).max() > 0.1


def test_what_does_not_fit_says_so():
    with pytest.raises(pj.PeftError, match=r"weight_compander: headroom must be 0.7 or more, got 0.5"):
        pj.weight_compander(headroom=0.5)
    with pytest.raises(pj.PeftError, match="weight_compander: slope must be positive"):
        pj.weight_compander(slope=0.0)
    rest = pj.weight_compander(train_rest=False).init(KEY, PARAMS)[1]
    assert set(rest) == {PATH}
