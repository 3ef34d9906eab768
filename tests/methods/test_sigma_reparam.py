"""sigmaReparam: norms, gradients, and the iteration between steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import KEY, noisy, normal

import peftjax as pj

PARAMS = {"up": {"kernel": normal(KEY, (6, 5)), "bias": jnp.zeros(5)}}
X = normal(jax.random.key(1), (8, 6))
PATH = "up/kernel"


def loss(params):
    return jnp.sum(jnp.sin(X @ params["up"]["kernel"] + params["up"]["bias"]))


def begun(params=PARAMS, **options):
    method = pj.sigma_reparam(**options)
    frozen, trainable = method.init(KEY, params)
    return method, dataclasses.replace(frozen, advanced=True), trainable


def advanced(method, frozen, trainable, count):
    tx = method.optimizer(optax.sgd(1.0))
    state = tx.init(trainable)
    for step in range(count):
        frozen, trainable, state = method.advance(None, frozen, trainable, state, step=step, key=KEY, tx=tx)
    return frozen


def test_the_spectral_norm_is_gamma_once_the_iteration_has_converged():
    method, frozen, fresh = begun(start="one")
    first = method.merge(frozen, fresh)["up"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(first, 2), 1.0, rtol=1e-5)  # exact at once
    trainable = noisy(fresh, scale=0.5)
    frozen = advanced(method, frozen, trainable, 60)
    merged = method.merge(frozen, trainable)["up"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(merged, 2), np.abs(trainable[PATH]["gamma"]), rtol=1e-4)


def test_one_step_of_the_iteration_is_as_defined_and_apply_makes_none():
    method, frozen, fresh = begun()
    trainable = noisy(fresh)
    w, v = np.asarray(trainable[PATH]["weight"]), np.asarray(frozen.state[PATH]["v"])
    u = w @ v / np.linalg.norm(w @ v)
    after = advanced(method, frozen, trainable, 1).state[PATH]
    np.testing.assert_allclose(after["u"], u, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["v"], w.T @ u / np.linalg.norm(w.T @ u), rtol=1e-4, atol=1e-6)


def test_gradients_are_the_formulas_and_orthogonal_to_the_weight():
    method, frozen, fresh = begun()
    trainable = noisy(fresh)
    got = jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t)))(trainable)[PATH]
    g = np.asarray(jax.grad(loss)(method.merge(frozen, trainable))["up"]["kernel"])
    w, gamma = np.asarray(trainable[PATH]["weight"]), float(trainable[PATH]["gamma"])
    u, v = (np.asarray(frozen.state[PATH][name]) for name in "uv")
    sigma = u @ w @ v
    inner = np.sum(g * w)
    np.testing.assert_allclose(got["weight"], gamma / sigma * (g - inner / sigma * np.outer(u, v)), atol=1e-4)
    np.testing.assert_allclose(got["gamma"], inner / sigma, rtol=1e-3)
    assert abs(np.sum(got["weight"] * w)) < 1e-4 * np.linalg.norm(g) * np.linalg.norm(w)


def test_the_size_of_the_weight_does_not_matter_and_zero_stays_as_it_is():
    params = {"up": {"kernel": jnp.stack([PARAMS["up"]["kernel"], jnp.zeros((6, 5))])}}
    method, frozen, fresh = begun(params)
    np.testing.assert_allclose(method.merge(frozen, fresh)["up"]["kernel"], params["up"]["kernel"], atol=1e-5)
    larger = {PATH: {**fresh[PATH], "weight": 7.0 * fresh[PATH]["weight"]}}
    np.testing.assert_allclose(
        method.merge(frozen, larger)["up"]["kernel"], params["up"]["kernel"], atol=1e-5
    )
    assert fresh[PATH]["gamma"][1] == 1.0
    run = pj.adapt(lambda p: jnp.sum(jnp.sin(X @ p["up"]["kernel"][1] + 1.0)))
    grads = jax.grad(lambda t: run(method.apply(frozen, t)))(fresh)[PATH]
    assert np.isfinite(grads["weight"]).all()
    assert np.abs(grads["weight"][1]).max() > 0.1


def test_a_1_by_1_weight_is_gamma_times_its_sign():
    method, frozen, fresh = begun({"up": {"kernel": jnp.array([[-3.0]])}}, start="one")
    assert method.merge(frozen, fresh)["up"]["kernel"] == -1.0
