"""Training with rounding in every step: `quantized(..., train=True)`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, all_but_slow, noisy

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.quantize.formats import FORMATS
from peftjax.testing.comparisons import assert_close
from peftjax.weights.rounded import with_codes

PARAMS = {
    "up": {"kernel": jax.random.normal(KEY, (64, 12)), "bias": jnp.ones(12)},
    "down": {"kernel": jax.random.normal(KEY, (12, 8))},
}
X = jax.random.normal(KEY, (5, 64))


def model(params, x):
    return jnp.tanh(0.1 * x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


def loss(params, x):
    return jnp.sum(jnp.sin(model(params, x)))


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(FORMATS, ("int4",)))
def test_forward_is_that_of_the_codes_and_the_gradient_passes_through(name):
    options = {"format": name, "search": 1}
    method, plain = pj.quantized(**options, train=True), pj.quantized(**options)
    frozen, weights = method.init(KEY, PARAMS)
    assert set(weights) == {"up/kernel", "down/kernel"}

    @jax.jit
    def found(weights, frozen, x):
        return jax.value_and_grad(lambda w: pj.adapt(loss)(method.apply(frozen, w), x))(weights)

    value, gradient = found(weights, frozen, X)
    rounded = plain.merge(*plain.init(KEY, PARAMS))
    wanted, dense = jax.value_and_grad(loss)(rounded, X)
    assert_close(value, wanted)
    merged = method.merge(frozen, weights)
    exported = with_codes(method.apply(frozen, weights))
    for module in ("up", "down"):
        np.testing.assert_array_equal(merged[module]["kernel"], rounded[module]["kernel"])
        np.testing.assert_array_equal(exported[module]["kernel"].dense(), merged[module]["kernel"])
        got, want = np.asarray(gradient[f"{module}/kernel"]), np.asarray(dense[module]["kernel"])
        if name == "mxfp4" or name.startswith(
            "bcq"
        ):  # a scale that is rounded down, or fitted, cuts some off
            passed = got != 0
            assert 0.85 < passed.mean() < (1 if module == "up" else 1.1)
            got, want = got[passed], want[passed]
        assert_close(got, want, 1e-4)


@pytest.mark.slow
def test_what_is_cut_off_gets_no_gradient():
    """Ranges that a search makes smaller: 2 bits of numbers of which one is far larger."""
    w = jnp.ones((64, 1)).at[0].set(1.6)
    method = pj.quantized(format="int2", search=20, train=True, targets="w")
    frozen, weights = method.init(KEY, {"w": w})
    gradient = jax.grad(
        lambda t: jnp.sum(pj.adapt(lambda p: jnp.ones((1, 64)) @ p["w"])(method.apply(frozen, t)))
    )
    assert float(method.merge(frozen, weights)["w"].max()) < 1.4
    np.testing.assert_array_equal(gradient(weights)["w"], (w < 1.5).astype(jnp.float32))


@pytest.mark.slow
def test_training_lowers_the_loss_of_the_rounded_model():
    """Whole weights, and a LoRA with what it is merged into."""
    target = model(PARAMS, X)

    def distance(params, x):
        return jnp.mean((model(params, x) - target) ** 2)

    plain = pj.quantized(format="int3", group=32)
    start = float(distance(plain.merge(*plain.init(KEY, PARAMS)), X))
    rounded = pj.quantized(format="int3", group=32, train=True)
    for method in (rounded, pj.chain(pj.lora(rank=8), rounded)):
        frozen, trainable = method.init(KEY, PARAMS)
        tx = optax.adam(1e-2)

        @jax.jit
        def step(trainable, state, frozen=frozen, method=method, tx=tx):
            gradient = jax.grad(lambda t: pj.adapt(distance)(method.apply(frozen, t), X))(trainable)
            updates, state = tx.update(gradient, state)
            return optax.apply_updates(trainable, updates), state

        state = tx.init(trainable)
        for _ in range(60):
            trainable, state = step(trainable, state)
        end = float(distance(method.merge(frozen, trainable), X))
        assert end < 0.8 * start, (start, end)
        codes = with_codes(method.apply(frozen, trainable))
        assert_close(pj.adapt(model)(codes, X), model(method.merge(frozen, trainable), X))


def test_a_lora_is_rounded_with_its_base():
    method = pj.chain(pj.lora(rank=2), pj.quantized(format="int4", group=32, train=True))
    frozen, fresh = method.init(KEY, PARAMS)
    assert not fresh["quantized"]
    trained = noisy(fresh)
    lora = pj.lora(rank=2)
    base, _ = lora.init(KEY, PARAMS)
    plain = pj.quantized(format="int4", group=32)
    wanted = plain.merge(*plain.init(KEY, lora.merge(base, trained["lora"])))
    assert_close(method.merge(frozen, trained), wanted)
    with pytest.raises(PeftError, match="already trains"):
        pj.chain(pj.quantized(train=True), pj.lora(rank=2)).init(KEY, PARAMS)
    with pytest.raises(PeftError, match="rounded already"):
        pj.chain(pj.nf4(), pj.quantized(train=True)).init(KEY, PARAMS)


def test_its_options_survive_json_and_16_bits_round_the_same_codes():
    method = pj.build(json.loads(json.dumps(pj.describe(pj.quantized(format="int4", train=True)))))
    frozen, weights = method.init(KEY, PARAMS)
    applied = method.apply(frozen, weights)["up"]["kernel"]
    np.testing.assert_array_equal(applied.cast(jnp.bfloat16).dense(), applied.dense().astype(jnp.bfloat16))
