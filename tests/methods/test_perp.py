"""MaskLoRA and ScaleLoRA: their gradients, and zeros that stay through training and merging."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.weights.score_pruned import in_pattern

N, M, PATH = 8, 6, "up/kernel"


def pruned(key, shape=(N, M)):
    w = normal(key, shape)
    return w * in_pattern(jnp.abs(w), (2, 4))


PARAMS = {
    "up": {"kernel": pruned(KEY), "bias": jnp.zeros(M)},
    "norm": {"scale": jnp.ones(M), "bias": jnp.zeros(M)},
}
X = normal(jax.random.key(1), (5, N))
TARGET = normal(jax.random.key(2), (5, M))


def loss(params, x=X):
    y = (x @ params["up"]["kernel"] + params["up"]["bias"]) * params["norm"]["scale"] + params["norm"]["bias"]
    return jnp.sum((y - TARGET) ** 2)


@pytest.mark.parametrize("name", ["mask_lora", "scale_lora"])
def test_gradients_are_the_formulas(name):
    method = pj.METHODS[name].factory(rank=2)
    frozen, fresh = method.init(KEY, PARAMS)
    trainable = noisy(fresh)
    got = jax.jit(jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t))))(trainable)[PATH]
    w, x, target = (np.asarray(value, np.float64) for value in (PARAMS["up"]["kernel"], X, TARGET))
    a, b = (np.asarray(trainable[PATH][slot], np.float64) for slot in "ab")
    if name == "mask_lora":
        changed, factor = w + 2.0 * (w != 0) * (a.T @ b), 2.0 * (w != 0)
    else:
        a, b = a + 0.5**0.5, b + 0.5**0.5
        changed, factor = w * (a.T @ b), w
    dense = x.T @ (2 * (x @ changed - target)) * factor
    np.testing.assert_allclose(got["a"], b @ dense.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["b"], a @ dense, rtol=1e-4, atol=1e-4)
    merged = method.merge(frozen, trainable)["up"]["kernel"]
    np.testing.assert_allclose(merged, changed, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged == 0, w == 0)
    np.testing.assert_allclose(method.merge(frozen, fresh)["up"]["kernel"], w, rtol=1e-6)


@pytest.mark.parametrize("name", ["mask_lora", "scale_lora"])
def test_zeros_stay_beside_biases_and_norms_in_a_training(name):
    factors = pj.METHODS[name].factory(rank=2, targets=["up"])
    method = pj.chain(factors, pj.bitfit(), pj.ln_tuning(exclude=".*bias"))
    training = pj.training(method, lambda params, batch: pj.adapt(loss)(params, batch["x"]), optax.adam(0.1))
    state, losses = training.start(KEY, PARAMS), []
    for _ in range(5):
        state, metrics = training.step(state, {"x": X})
        losses.append(float(metrics["loss"]))
        merged = method.merge(state.frozen, state.trainable)
        np.testing.assert_array_equal(merged["up"]["kernel"] == 0, PARAMS["up"]["kernel"] == 0)
    assert losses[-1] < losses[0]
    assert all(np.any(merged[m][n] != PARAMS[m][n]) for m in PARAMS for n in PARAMS[m])
    np.testing.assert_allclose(
        loss(merged), pj.adapt(loss)(method.apply(state.frozen, state.trainable)), rtol=1e-5
    )
