"""Blocks that keep codes for their backward pass: same values, close gradients, fewer bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_t5
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import all_but_slow, assert_close, noisy, quick_at

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config
from peftjax.planner.residuals import kept_arrays, nbytes

KEY = jax.random.key(0)
EXACT = {"activation": 32, "gated": 32, "norm": 32, "attention": 32, "inputs": 32}
V, B, S, N = 50, 2, 16, 4
LLAMA = {"model_type": "llama", "vocab_size": V, "num_attention_heads": N, "max_position_embeddings": S}
SANDWICH = {
    "norm": "rms_plus_one",
    "norm_order": "sandwich",
    "activation": "gelu_pytorch_tanh",
    "softcap": 5.0,
}
IDS = jax.random.randint(KEY, (B, S), 0, V)
BATCH = {"input_ids": IDS, "labels": IDS}


def encoder(layers=2, width=64, inner=128, dtype="float32", activation="gelu", rate=0.0):
    config = BertConfig(
        vocab_size=V,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=N,
        intermediate_size=inner,
        hidden_act=activation,
        hidden_dropout_prob=rate,
        attention_probs_dropout_prob=rate,
    )
    return bert(config, head="masked_lm", dtype=dtype)


def llama(layers=2, width=64, inner=96, dtype="float32", **block):
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    config = read_config({**LLAMA, **sizes, "num_key_value_heads": 2})
    config = dataclasses.replace(config, block=dataclasses.replace(config.block, **block))
    return decoder(config, dtype=dtype)


def with_labels(batch):
    return {**batch, "labels": batch["decoder_input_ids"]}


MODELS = {
    "encoder": lambda: (encoder(), BATCH),
    "relu": lambda: (encoder(activation="relu"), BATCH),
    "llama": lambda: (llama(), BATCH),
    "sandwich": lambda: (llama(qk_norm=True, **SANDWICH), BATCH),
    "t5": lambda: (tiny_t5.make()[0], with_labels(tiny_t5.token_batch())),
}
METHODS = {
    "full": pj.full(),
    "lora": pj.lora(rank=2),
    "query and value": pj.lora(rank=2, targets=["query", "value"]),
    "norms": pj.unfreeze(r"blocks/.*norm/(scale|bias)"),
}


@functools.cache
def made(name):
    model, batch = MODELS[name]()
    return model, noisy(jax.jit(model.init)(KEY), scale=0.05), batch


def step(method, model, params, batch, key=None):
    """`(loss, gradient)` of a method, its adapter as after some steps."""
    frozen, trainable = method.init(KEY, params)
    forward = pj.adapt(lambda params, batch: method.model(model)(params, batch, key=key))

    def loss(trainable):
        return pj.losses.cross_entropy(forward(method.apply(frozen, trainable), batch), batch)

    value, grads = jax.jit(jax.value_and_grad(loss))(noisy(trainable, scale=0.02))
    return value, grads


def beside(method, **bits):
    return pj.chain(pj.coded_residuals(**bits), method)


def coded(model, **bits):
    return pj.coded_residuals(**bits).model(model)


def cosine(left, right):
    left, right = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(y)]) for y in (left, right))
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(MODELS, ("llama",)))
def test_values_are_bit_for_bit_and_without_rounding_gradients_are_too_but_for_order(name):
    model, params, batch = made(name)
    value, exact = step(METHODS["full"], model, params, batch)
    found, grads = step(METHODS["full"], coded(model, **EXACT), params, batch)
    # Every operation is the same, but the compiler may sum the loss in another order.
    np.testing.assert_allclose(found, value, rtol=2.5e-7)
    assert_close(grads, exact, 2e-5)
    again, close = step(METHODS["full"], coded(model, attention=8), params, batch)
    np.testing.assert_allclose(again, value, rtol=2.5e-7)
    assert 0.99 < cosine(close, exact) < 1.0 - 1e-9


@pytest.mark.slow
def test_lora_with_the_models_dropout():
    model, params = encoder(rate=0.3), made("encoder")[1]
    method = pj.lora(rank=2)
    value, exact = step(method, model, params, BATCH, key=KEY)
    found, grads = step(method, coded(model, **EXACT), params, BATCH, key=KEY)
    # Every operation is the same, but the compiler may fuse those around a mask otherwise.
    np.testing.assert_allclose(found, value, rtol=1e-6)
    assert_close(grads, exact, 2e-5)
    again, close = step(method, coded(model), params, BATCH, key=KEY)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert cosine(close, exact) > 0.99


@pytest.mark.slow
def test_bfloat16_computation():
    params = made("llama")[1]
    model = llama(dtype="bfloat16")
    value, exact = step(METHODS["lora"], model, params, BATCH)
    found, grads = step(METHODS["lora"], coded(model), params, BATCH)
    assert found == value
    assert cosine(grads, exact) > 0.99


def bits_per_token(model, method):
    """What the blocks keep per layer and token, in bits; without a method, for their input's gradient."""
    model = coded(model)
    params = jax.eval_shape(model.init, KEY)
    hidden = jax.ShapeDtypeStruct((B, S, model.block.config.width), model.block.dtype)
    context = jax.eval_shape(lambda params: model.run_embed(params, BATCH)[1], params)
    run = pj.adapt(lambda params, hidden, context: model.run_blocks(params, hidden, context))
    if method is None:
        kept = kept_arrays(lambda hidden, *rest: run(rest[0], hidden, rest[1]), hidden, params, context)
    else:
        frozen, trainable = jax.eval_shape(method.init, KEY, params)
        of = lambda trainable, frozen, *rest: run(method.apply(frozen, trainable), *rest)
        kept = kept_arrays(of, trainable, frozen, hidden, context)
    places = (model.num_layers, B, S)
    return 8 * nbytes([array for array in kept if array.shape[:3] == places]) / np.prod(places)


D, F, Q, K = 256, 512, 256, 128
FROZEN = 9 * D + 64 + 4.5 * (Q + 2 * K)


@pytest.mark.parametrize(
    ("model", "method", "wanted"),
    quick_at(
        [
            ("encoder", "frozen", 9 * D + 64 + 4.5 * 3 * D + 4 * F),
            ("encoder", "query and value", 9 * D + 64 + 4.5 * 3 * D + 4 * F + 8.5 * D),
            ("encoder", "lora", 9 * D + 64 + 4.5 * 3 * D + 4 * F + 17 * D + 8.5 * (D + F)),
            ("llama", "frozen", FROZEN + 17 * F),
            ("llama", "query and value", FROZEN + 17 * F + 4 * D),
            ("llama", "lora", FROZEN + 17 * F + 8 * D + 8.5 * Q),
        ],
        every=3,
    ),
)
def test_the_bits_kept_are_those_of_the_docstring(model, method, wanted):
    sizes = {"width": D, "inner": F, "layers": 3, "dtype": "bfloat16"}
    chosen = encoder(**sizes) if model == "encoder" else llama(**sizes)
    assert bits_per_token(chosen, METHODS.get(method)) == wanted


@pytest.mark.slow
def test_generation_is_unchanged():
    model, params, _ = made("llama")
    batch = {"input_ids": IDS[:, :5]}
    plain = pj.generate(model, params, batch, max_new_tokens=4)
    again = pj.generate(coded(model), params, batch, max_new_tokens=4)
    np.testing.assert_array_equal(plain.tokens, again.tokens)


@pytest.mark.slow
def test_under_remat_the_gradients_are_the_same():
    model, params, batch = made("llama")
    method = beside(METHODS["lora"])
    value, grads = step(method, model, params, batch)
    again, same = step(method, dataclasses.replace(model, remat="nothing_saveable"), params, batch)
    assert value == again
    assert_close(same, grads, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("features", [1, 2])
def test_on_a_mesh_of_eight_devices(features):
    """Batches and, with two, also features are split; a group of 32 lies within a shard."""
    model, params, batch = made("encoder")
    method = beside(METHODS["lora"], group=32)
    value, grads = step(method, model, params, batch)
    mesh = jax.make_mesh((8 // features, features), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    wide = jax.tree.map(lambda x: jnp.concatenate([x] * 4), batch)
    split = jax.device_put(wide, NamedSharding(mesh, P("data")))
    specs = {"up/kernel": P(None, None, "tensor"), "down/kernel": P(None, "tensor", None)}

    def place(path, leaf):
        spec = next((spec for name, spec in specs.items() if path.endswith(name)), P())
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    found, same = step(method, model, tree.map_named(place, params), split)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    # A sum in another order may take another code.
    assert cosine(same, grads) > 0.9999


def test_a_model_that_is_no_backbone_is_an_error():
    with pytest.raises(PeftError, match=r"coded_residuals rewrites the blocks of a backbone"):
        pj.coded_residuals().model(lambda params, batch: batch)


@pytest.mark.parametrize(("option", "value"), [("norm", 5), ("attention", 4.0), ("group", 1)])
def test_bits_that_do_not_exist_are_errors(option, value):
    with pytest.raises(PeftError):
        pj.coded_residuals(**{option: value})


def test_a_configuration_makes_the_same_method():
    method = beside(pj.lora(rank=2), attention=8)
    assert pj.describe(pj.build(pj.describe(method))) == pj.describe(method)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora", "query and value"])
@pytest.mark.parametrize("family", ["encoder", "llama"])
def test_twelve_blocks_have_a_cosine_above_0_999(family, name):
    model = {"encoder": encoder, "llama": llama}[family](layers=12, width=128, inner=384)
    draw = jax.tree.map(lambda x: 2.5 * x if x.ndim > 2 else x, jax.jit(model.init)(KEY))
    _, exact = step(METHODS[name], model, draw, BATCH)
    _, found = step(METHODS[name], coded(model), draw, BATCH)
    assert cosine(found, exact) > 0.999
    _, found = step(METHODS[name], coded(model, attention=8), draw, BATCH)
    each = [cosine(x, y) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact)) if jnp.any(y)]
    assert np.quantile(each, 0.1) > 0.995


@pytest.mark.slow
def test_training_takes_the_same_course():
    model, params, batch = made("llama")
    courses = []
    method = METHODS["lora"]
    frozen, trainable = method.init(KEY, params)
    for forward in (pj.adapt(model), pj.adapt(coded(model))):
        tx = optax.adam(1e-2)
        state = tx.init(trainable)

        @jax.jit
        def train(trainable, state, tx=tx, forward=forward):
            loss = lambda t: pj.losses.cross_entropy(forward(method.apply(frozen, t), batch), batch)
            value, grads = jax.value_and_grad(loss)(trainable)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        course, current = [], trainable
        for _ in range(40):
            current, state, value = train(current, state)
            course.append(float(value))
        courses.append(course)
    assert courses[0][-1] < 0.7 * courses[0][0]
    np.testing.assert_allclose(courses[1], courses[0], rtol=0.05)
