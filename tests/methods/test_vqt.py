"""Visual query tuning against the released form, which joins queries and tokens, and what backward keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside import TOKENS, assert_trains_sharded, images, kept, loss_of, made
from support import KEY, all_but_slow, assert_close, made_shapes, noisy
from tiny_models import tiny
from tiny_t5 import make as make_t5

import peftjax as pj
from peftjax.backbone.context import Context
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods.side._layer_states import unit
from peftjax.models.vit import ViTConfig, vit

QUERIES = 2


def texts(name):
    model = tiny(name)
    mask = jnp.array([[1] * 5, [1] * 3 + [0] * 2])
    return model.forward, model.params, {**model.batch, "attention_mask": mask}


def queried(params, **options):
    """`(method, frozen, trainable)`."""
    method = pj.vqt(**{"num_queries": QUERIES, **options})
    return method, *made(method, params)


def joined(model, params, batch, queries):
    """H_L and F as the released code computes them: one stream, where the queries are masked."""
    hidden, context = model.run_embed(params, batch)
    rows, length = hidden.shape[:2]
    mask = jnp.ones((rows, length), bool) if context.mask is None else context.mask
    last = jnp.max(jnp.where(mask, jnp.arange(length), 0), axis=1)
    context = dataclasses.replace(context, mask=jnp.pad(mask, ((0, 0), (0, QUERIES))))
    if context.rotation is not None:
        at = jnp.concatenate([jnp.arange(length) + jnp.zeros((rows, 1), int), last[:, None]], axis=1)
        at = jnp.pad(at, ((0, 0), (0, QUERIES - 1)), mode="edge")
        turned = tuple(part[0][at] for part in context.rotation)
        context = dataclasses.replace(context, rotation=turned)
    features = []
    for number, own in enumerate(queries):
        layer = jax.tree.map(lambda leaf: leaf[number], model.layers(params))  # noqa: B023
        own = jnp.broadcast_to(own, (rows, *own.shape))
        out = model.run_layer(layer, jnp.concatenate([hidden, own], axis=1), context)
        hidden, queried = jnp.split(out, [length], axis=1)
        features.append(queried)
    return hidden, jnp.stack(features)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(("images", "backbone", "encoder classifier"), ("images",)))
def test_outputs_and_gradients_are_those_of_the_released_form_in_one_pass_and_in_two(name):
    model, params, batch = images() if name == "images" else texts(name)
    results = []
    for passes in (1, 2):
        method, frozen, trainable = queried(params, passes=passes)
        results.append(jax.jit(jax.value_and_grad(loss_of(method, model, frozen, batch)))(trainable))
    adapted = method.model(model)

    def released(trainable):
        read = joined(model, params, batch, trainable["queries"])
        context = model.run_embed(params, batch)[1]
        return jnp.sum(jnp.sin(3.0 * adapted.run_head(method.apply(frozen, trainable), read, context)))

    results.append(jax.jit(jax.value_and_grad(released))(trainable))
    assert_close(results[0], results[1], 1e-6)
    assert_close(results[0], results[2], 5e-6)
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in jax.tree.leaves(results[0][1]))


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_the_tokens_do_not_see_the_queries_and_a_layer_sees_its_own_queries_alone(passes):
    model, params, batch = images()
    method, frozen, trainable = queried(params, passes=passes)
    adapted, (hidden, context) = method.model(model), model.run_embed(params, batch)

    def run(queries):
        applied = method.apply(frozen, {**trainable, "queries": queries})
        return adapted.run_blocks(applied, hidden, context)

    queries = trainable["queries"]
    last, features = run(queries)
    np.testing.assert_array_equal(last, model.run_blocks(params, hidden, context))
    _, changed = run(queries.at[1].add(1.0))
    moved = jnp.abs(changed - features).max(axis=(1, 2, 3)) > 0
    np.testing.assert_array_equal(moved, [False, True, False])
    _, twins = run(queries.at[:, 1].set(queries[:, 0]))
    np.testing.assert_array_equal(twins[:, :, 0], twins[:, :, 1])
    np.testing.assert_array_equal(twins[:, :, 0], features[:, :, 0])


@pytest.mark.slow
def test_features_are_of_length_one_and_order_of_tokens_is_nothing_to_them():
    model, params, batch = images()
    trainable = queried(params)[2]
    layer = jax.tree.map(lambda leaf: leaf[0], model.layers(params))
    hidden, _ = model.run_embed(params, batch)
    queries = jnp.broadcast_to(trainable["queries"][0], (2, QUERIES, 16))
    given = [Context(attended=tokens) for tokens in (hidden, hidden[:, ::-1])]
    read = [model.run_layer(layer, queries, context) for context in given]
    assert_close(read[0], read[1])
    np.testing.assert_allclose(jnp.linalg.norm(unit(read[0], 1e-12), axis=-1), 1.0, rtol=1e-5)
    assert bool(jnp.isfinite(jax.grad(lambda x: unit(x, 1e-12).sum())(jnp.zeros(4))).all())


@pytest.mark.slow
def test_sizes_and_start():
    model = vit(ViTConfig(labels=tuple("abcd")), head="classifier")
    shapes = jax.eval_shape(pj.vqt(num_queries=1).init, KEY, jax.eval_shape(model.init, KEY))[1]
    assert tree.count(shapes) == 12 * 768 + (768 * 13 + 1) * 4
    _, params, _ = images()
    queries = pj.vqt(num_queries=50).init(KEY, params)[1]["queries"]
    bound = np.sqrt(6.0 / (3 * 2 * 2 + 16))
    assert 0.98 * bound < float(jnp.abs(queries).max()) <= bound


@pytest.mark.slow
def test_one_pass_keeps_keys_and_values_or_the_states_alone():
    token = (3, 2, TOKENS)
    of_tokens = [shape for shape in kept(pj.vqt(), *images()) if TOKENS in shape]
    assert of_tokens == [(*token, 2, 8), (*token, 2, 8)]
    of_tokens = [shape for shape in kept(pj.vqt(), *images(remat="nothing_saveable")) if TOKENS in shape]
    assert of_tokens == [(*token, 16)]


@pytest.mark.slow
def test_two_passes_keep_what_does_not_grow_with_the_layers():
    """But the features themselves and what the head reads of them."""
    features = lambda layers: [(2, 16 + layers * QUERIES * 16), (2, layers, QUERIES * 16)]
    kinds = []
    for layers in (3, 6):
        shapes = kept(pj.vqt(num_queries=QUERIES, passes=2), *images(layers))
        kinds.append([shape for shape in shapes if shape not in (*features(layers), (layers,))])
    assert kinds[0] == kinds[1] == [(2, 16), (2, TOKENS, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_backward_makes_nothing_of_the_feed_forward_of_tokens(passes):
    model, params, batch = images()
    method, frozen, trainable = queried(params, passes=passes)
    loss = loss_of(method, model, frozen, batch)
    shapes = list(made_shapes(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr))
    wide = [shape for shape in shapes if shape == (2 * TOKENS, 40)]
    assert len(wide) == passes  # once a forward pass
    assert (2 * QUERIES, 40) in shapes


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_a_structured_base_is_read_and_gets_no_gradient(passes):
    model, params, batch = images()
    lora, method = pj.lora(rank=2, targets=["query", "up", "patch_conv"]), pj.vqt(passes=passes)
    base, adapter = lora.init(KEY, params)

    def loss(trainable, adapter):
        frozen = method.init(KEY, lora.apply(base, adapter))[0]
        return jnp.sum(pj.adapt(method.model(model))(method.apply(frozen, trainable), batch))

    trainable = noisy(method.init(KEY, params)[1])
    value, (own, of_base) = jax.jit(jax.value_and_grad(loss, (0, 1)))(trainable, noisy(adapter))
    assert float(jnp.abs(value - loss(trainable, adapter))) > 1e-3
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_base))
    assert all(leaf.any() for leaf in jax.tree.leaves(own))


def test_what_no_gradient_reaches_cannot_be_trained():
    params = images()[1]
    for other in (pj.lora(rank=2, targets=["query"]), pj.bitfit(), pj.chain(pj.unfreeze(["embed"]))):
        with pytest.raises(PeftError, match=r"vqt: '.*' is trained by '.*', but no gradient reaches"):
            pj.chain(pj.vqt(), other).init(KEY, params)


@pytest.mark.slow
def test_dropout_of_queries_draws_for_every_row_and_only_with_a_key():
    model, params, batch = images()
    method, frozen, trainable = queried(params, dropout=0.5)
    adapted = method.model(model)
    hidden, context = model.run_embed(params, jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), batch))
    run = jax.jit(lambda applied: adapted.run_blocks(applied, hidden, context)[1])
    features = run(method.apply(frozen, trainable))
    np.testing.assert_allclose(features[:, 0], features[:, 1], atol=1e-6)
    first, second = (run(method.apply(frozen, trainable, key=jax.random.key(n))) for n in (1, 2))
    for other in (first[:, 1], second[:, 0], features[:, 0]):
        assert float(jnp.abs(first[:, 0] - other).max(axis=(1, 2)).min()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_sharded_training_is_training_on_one_device(passes):
    assert_trains_sharded(pj.vqt(passes=passes, dropout=0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pj.vqt(num_queries=0), "num_queries must be positive, got 0"),
        (lambda: pj.vqt(passes=3), "passes must be one of 1, 2, got 3"),
        (lambda: pj.vqt(dropout=1.0), "dropout"),
        (lambda: pj.vqt().init(KEY, tiny("encoder").params), "has none; load it with head='classifier'"),
        (lambda: pj.vqt().model(tiny("encoder").forward), "has none; load it with head='classifier'"),
        (lambda: pj.vqt().model(make_t5("classifier")[0]), "vqt is not for an encoder-decoder"),
        (lambda: pj.vqt().init(KEY, make_t5("classifier")[1]), "vqt is not for an encoder-decoder"),
        (lambda: pj.vqt().model(pj.vqt().model(images()[0])), "'vqt' and 'vqt' both run the blocks"),
        (lambda: pj.vqt().model(lambda params, batch: batch), "rewrites the blocks of a backbone"),
    ],
)
def test_what_it_is_not_for_is_an_error(call, message):
    with pytest.raises(PeftError, match=message):
        call()
