"""The loss over a vocabulary in parts equals the loss of the whole, whatever is differentiated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, noisy

import peftjax as pj
from peftjax import losses
from peftjax.backbone.logits import Logits

B, S, D, V = 3, 10, 6, 17


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four chunks, the last one filled up."""
    monkeypatch.setattr(losses, "CHUNK", 9)


@pytest.fixture
def batch():
    labels = jax.random.randint(jax.random.key(1), (B, S), 0, V)
    weights = jax.random.uniform(jax.random.key(2), (B, S)).at[0, :4].set(0.0)
    return {"labels": labels, "weights": weights}


def make(tied=False, bias=True, softcap=None):
    keys = jax.random.split(KEY, 3)
    kernel = jax.random.normal(keys[1], (V, D) if tied else (D, V))
    hidden = jax.random.normal(keys[0], (B, S, D))
    return Logits(hidden, kernel, jax.random.normal(keys[2], (V,)) if bias else None, softcap, tied)


@pytest.mark.parametrize(
    "logits", [make(), make(tied=True, bias=False), make(softcap=1.5)], ids=["untied", "tied", "softcap"]
)
@pytest.mark.parametrize(
    "trained",
    [
        pytest.param(("hidden",), marks=pytest.mark.slow, id="hidden"),
        pytest.param(("kernel",), marks=pytest.mark.slow, id="kernel"),
        pytest.param(("hidden", "kernel"), id="hidden+kernel"),
    ],
)
def test_sums_and_gradients_equal_those_of_the_array(logits, trained, batch):
    def objective(parts, dense):
        full = dataclasses.replace(logits, **parts)
        sums, weight = losses.classification(full.dense() if dense else full, batch)
        return 2.5 * sums["loss"] / weight, sums

    parts = {name: getattr(logits, name) for name in trained}
    got, want = (
        jax.jit(jax.value_and_grad(lambda p, dense=dense: objective(p, dense), has_aux=True))(parts)
        for dense in (False, True)
    )
    assert_close(got, want, 1e-5)


@pytest.mark.slow
def test_a_low_rank_output_layer_gets_thin_gradients(batch):
    logits = make(bias=False)
    method = pj.lora(rank=2, targets=["kernel"])
    frozen, trainable = method.init(KEY, {"output": {"kernel": logits.kernel}})
    trainable = noisy(trainable)

    def loss(trainable, merged):
        kernel = (method.merge if merged else method.apply)(frozen, trainable)["output"]["kernel"]
        return losses.cross_entropy(dataclasses.replace(logits, kernel=kernel), batch)

    assert_close(jax.grad(loss)(trainable, False), jax.grad(loss)(trainable, True), 1e-5)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(trainable, False))
    assert f"f32[{V},{D}]" not in jaxpr  # the transposed product of a dense gradient
    assert jaxpr.count(f"f32[{D},{V}]") <= 6


def test_half_precision_is_computed_in_float32(batch):
    logits = make()
    half = dataclasses.replace(logits, hidden=logits.hidden.astype(jnp.bfloat16))
    loss, gradient = jax.value_and_grad(
        lambda hidden: losses.cross_entropy(dataclasses.replace(half, hidden=hidden), batch)
    )(half.hidden)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, losses.cross_entropy(logits, batch), rtol=0.02)


def test_logits_are_an_array_where_one_is_asked_for():
    logits = make(softcap=2.0)
    assert logits.shape == (B, S, V)
    np.testing.assert_array_equal(np.asarray(logits), logits.dense())
    np.testing.assert_allclose(jnp.tanh(logits), jnp.tanh(logits.dense()), rtol=1e-6)
    last = logits.at(jnp.array([0, 3, 9]))
    np.testing.assert_allclose(last.dense()[2, 0], logits.dense()[2, 9], rtol=1e-6)


@pytest.mark.slow
def test_without_weights_every_label_counts(batch):
    logits, labels = make(), batch["labels"]
    ones = {"labels": labels, "weights": jnp.ones((B, S))}
    assert losses.cross_entropy(logits, {"labels": labels}) == losses.cross_entropy(logits, ones)
    assert losses.accuracy(logits, ones) == losses.accuracy(logits.dense(), ones)
