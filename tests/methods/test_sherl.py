"""SHERL against its equations written out, and what backward keeps and touches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside import (
    TOKENS,
    assert_generates_as_without_a_cache,
    assert_trains_sharded,
    images,
    kept,
    loss_of,
    made,
    products_of_gradient,
)
from support import KEY, all_but_slow, assert_close
from tiny_models import tiny
from tiny_t5 import make as make_t5

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods.side.sherl import merge, redundancy, shares_of
from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig

MASK = np.array([[1] * 5, [1] * 3 + [0] * 2])


def texts():
    model = tiny("encoder")
    return model.forward, model.params, {**model.batch, "attention_mask": MASK}


def norm(part, x, epsilon):
    centered = x - x.mean(-1, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + epsilon) * part["scale"] + part["bias"]


def written_out(model, params, own, batch):
    """The model's outputs by single layers, with the gradient everywhere."""
    hidden, context = model.run_embed(params, batch)
    layer = lambda number: jax.tree.map(lambda leaf: leaf[number], model.layers(params))
    found = [hidden]
    for number in range(model.num_layers - 1):
        found.append(model.run_layer(layer(number), found[-1], context))
    found = [jax.lax.stop_gradient(state) for state in found]
    narrow = [
        norm({k: v[n] for k, v in own["down_norm"].items()}, h @ kernel + bias, 1e-5)
        for n, (h, kernel, bias) in enumerate(zip(found, own["down"]["kernel"], own["down"]["bias"]))
    ]
    *early, guide = narrow
    cos = lambda a, b: (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
    alike = [sum(jax.nn.relu(cos(x, other)) for other in early) for x in early]
    w, b = own["confidence"]["weight"], own["confidence"]["bias"]
    strength = [jax.nn.relu((x * guide) @ w + b) / r for x, r in zip(early, alike)]
    total = sum(strength) + 1e-8
    z = guide + sum((e / total)[..., None] * x for e, x in zip(strength, early))
    u = norm(own["out_norm"], jax.nn.relu(z) @ own["out"]["kernel"] + own["out"]["bias"], 1e-12)
    u = u + jnp.tanh(own["gamma"] / 0.1) * found[-1]
    last = model.run_layer(layer(model.num_layers - 1), u, context)
    return model.run_head(params, last, context)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(("images", "texts"), ("images",)))
def test_outputs_and_gradients_are_those_of_its_equations(name):
    model, params, batch = images(4) if name == "images" else texts()
    method = pj.sherl()
    frozen, trainable = made(method, params)
    got = jax.jit(jax.value_and_grad(loss_of(method, model, frozen, batch)))(trainable)
    loss = lambda own: jnp.sum(jnp.sin(3.0 * written_out(model, params, own, batch)))
    assert_close(got, jax.jit(jax.value_and_grad(loss))(trainable), 1e-5)
    assert all(float(jnp.abs(g).max()) > 1e-4 for g in jax.tree.leaves(got[1]))


def test_redundancy_of_alike_and_of_different_features():
    x = jax.random.normal(KEY, (2, 5, 4))
    np.testing.assert_allclose(redundancy(jnp.stack([x] * 3)), 3.0, rtol=1e-6)
    apart = jnp.broadcast_to(jnp.eye(4)[:3, None, None], (3, 2, 5, 4))
    np.testing.assert_array_equal(redundancy(apart), 1.0)
    early = jax.random.normal(KEY, (3, 2, 5, 4))
    np.testing.assert_allclose(redundancy(7.0 * early), redundancy(early), rtol=1e-5)
    assert float(redundancy(early).min()) >= 1.0
    assert float(redundancy(early).max()) > 1.1


@pytest.mark.slow
def test_shares_are_one_together_or_nothing():
    early, guide = jax.random.normal(KEY, (3, 2, 5, 4)), jnp.abs(jax.random.normal(KEY, (2, 5, 4)))
    weight = jnp.ones(4)
    total = shares_of({"weight": weight, "bias": jnp.zeros(())}, early, guide).sum(0)
    assert bool(((jnp.abs(total - 1) < 1e-5) | (total == 0)).all())
    alike = shares_of({"weight": weight, "bias": jnp.ones(())}, jnp.stack([guide] * 3), guide)
    np.testing.assert_allclose(alike, 1 / 3, rtol=1e-6)
    none = {"weight": jnp.zeros(4), "bias": -jnp.ones(())}
    np.testing.assert_array_equal(merge(none, jnp.concatenate([early, guide[None]])), guide)
    grads = jax.grad(lambda x: merge(none, x).sum())(jnp.zeros((4, 2, 5, 4)))
    assert bool(jnp.isfinite(grads).all())


@pytest.mark.slow
def test_the_states_alone_make_the_frozen_model_and_at_first_nothing_of_them_goes_through():
    model, params, batch = images()
    method = pj.sherl()
    frozen, fresh = method.init(KEY, params)
    run = jax.jit(lambda t: method.model(model)(method.apply(frozen, t), batch))
    through = {**fresh, "gamma": jnp.array(10.0), "out_norm": jax.tree.map(jnp.zeros_like, fresh["out_norm"])}
    assert_close(run(through), model(params, batch), 1e-6)
    assert float(fresh["gamma"]) == 0.0
    last = jax.tree.map(lambda leaf: leaf[2], model.layers(params))
    hidden, context = model.run_embed(params, batch)
    nothing = model.run_layer(last, jnp.zeros_like(hidden), context)
    silent = {**through, "gamma": fresh["gamma"]}
    assert_close(run(silent), model.run_head(params, nothing, context), 1e-6)


def test_its_size_is_that_of_the_released_code():
    model = bert(BertConfig(vocab_size=11))
    shapes = jax.eval_shape(pj.sherl().init, KEY, jax.eval_shape(model.init, KEY))[1]
    size = lambda inner: 12 * (768 * inner + 3 * inner) + inner + 1 + inner * 768 + 3 * 768 + 1
    assert tree.count(shapes) == size(768 // 2)
    assert size(512) == 5_133_058  # there, where d is half of 1024


@pytest.mark.slow
def test_backward_keeps_the_states_their_narrow_form_and_one_layer():
    shapes = kept(pj.sherl(), *images(5))
    assert [shape for shape in shapes if shape[0] == 5] == [(5, 2, TOKENS, 8), (5, 2, TOKENS, 16)]
    assert not [shape for shape in shapes if shape[-2:] == (TOKENS, TOKENS) or shape[:2] == (4, 4)]
    of_layer = [shape for shape in shapes if shape[:2] == (2, TOKENS)]
    # Query, key and value; z; H_{L-1}, the two streams of the layer and attention's result or the head's.
    assert of_layer == [(2, TOKENS, 2, 8)] * 3 + [(2, TOKENS, 8)] + [(2, TOKENS, 16)] * 4 + [(2, TOKENS, 40)]
    remat = [shape for shape in kept(pj.sherl(), *images(5, remat="nothing_saveable")) if TOKENS in shape]
    assert (2, TOKENS, 40) not in remat


@pytest.mark.slow
def test_weights_of_early_layers_are_in_one_product_and_those_of_the_last_in_none_for_their_gradient():
    model, params, batch = images()
    products = products_of_gradient(pj.sherl(), model, params, batch)
    count = lambda shape: sum(shape in operands for operands, _ in products)
    # Once in the scan over the early layers, once in the last layer, once on the way back through it.
    assert [count(shape) for shape in ((16, 16), (16, 40), (40, 16))] == [12, 3, 3]
    made_here = {result for _, result in products}
    assert not {(16, 16), (16, 40), (40, 16)} & made_here
    assert {(8, 16), (16, 8)} & made_here  # of the way out


@pytest.mark.slow
def test_the_compiled_step_runs_the_early_layers_without_copying_their_weights():
    model, _, batch = images(12)
    model = dataclasses.replace(model, num_layers=12)
    params = jax.eval_shape(model.init, KEY)
    method = pj.sherl()
    frozen, trainable = jax.eval_shape(method.init, KEY, params)
    run = lambda t, f: method.model(model)(method.apply(f, t), jax.tree.map(lambda x: x[:1], batch))
    memory = jax.jit(run).lower(trainable, frozen).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tree.nbytes(params["blocks"]) / 2


@pytest.mark.slow
def test_a_lora_is_trained_in_the_last_layer_alone():
    model, params, batch = images()
    method = pj.chain(pj.lora(rank=2, targets=["query", "up"]), pj.sherl())
    frozen, trainable = made(method, params)
    grads = jax.jit(jax.grad(loss_of(method, model, frozen, batch)))(trainable)["lora"]
    for leaf in jax.tree.leaves(grads):
        assert not leaf[:-1].any()
        assert float(jnp.abs(leaf[-1]).max()) > 1e-6


@pytest.mark.slow
def test_bfloat16_features_give_finite_gradients_also_of_a_row_of_padding():
    model, params, batch = texts()
    model = dataclasses.replace(model, dtype="bfloat16")
    batch = {**batch, "attention_mask": np.array([[1] * 5, [0] * 5])}
    method = pj.sherl()
    frozen, trainable = made(method, params)
    grads = jax.jit(jax.grad(loss_of(method, model, frozen, batch)))(trainable)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_dropout_is_drawn_with_a_key_alone():
    model, params, batch = images()
    method = pj.sherl(dropout=0.5)
    frozen, trainable = made(method, params)
    run = jax.jit(lambda params: method.model(model)(params, batch))
    plain = run(method.apply(frozen, trainable))
    drawn = [run(method.apply(frozen, trainable, key=jax.random.key(n))) for n in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert min(float(jnp.abs(drawn[0] - other).max()) for other in (drawn[2], plain)) > 1e-3


@pytest.mark.slow
def test_it_generates_with_a_cache():
    assert_generates_as_without_a_cache(pj.sherl())


@pytest.mark.slow
def test_sharded_training_is_training_on_one_device():
    assert_trains_sharded(pj.sherl(dropout=0.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pj.sherl(factor=0), "factor must be positive, got 0"),
        (lambda: pj.sherl(dropout=1.0), "dropout"),
        (lambda: pj.sherl(factor=17).init(KEY, images()[1]), "factor 17 is larger than the model's width 16"),
        (lambda: pj.sherl().init(KEY, images(1)[1]), "one layer has no earlier ones"),
        (lambda: pj.sherl().model(make_t5()[0]), "sherl is not for an encoder-decoder"),
        (lambda: pj.sherl().init(KEY, make_t5()[1]), "sherl is not for an encoder-decoder"),
        (lambda: pj.sherl().model(pj.unipt().model(images()[0])), "'sherl' and 'unipt' both run the blocks"),
    ],
)
def test_what_it_is_not_for_is_an_error(call, message):
    with pytest.raises(PeftError, match=message):
        call()
