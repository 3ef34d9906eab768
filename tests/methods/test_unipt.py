"""UniPT against its equations written out, and what backward keeps and touches."""

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
from support import KEY, assert_close, noisy, quick_at
from tiny_decoder import make_decoder
from tiny_models import tiny
from tiny_t5 import make as make_t5

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods.side._unipt_network import confidence, interaction
from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.models.decoder import decoder

VARIANTS = ("vse", "clip4clip", "clip_vil")
MASK = np.array([[1] * 5, [1] * 3 + [0] * 2])


def states(model, params, batch):
    """H_0 ... H_L by single layers."""
    hidden, context = model.run_embed(params, batch)
    found = [hidden]
    for number in range(model.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[number], model.layers(params))  # noqa: B023
        found.append(model.run_layer(layer, found[-1], context))
    return [np.asarray(state, np.float64) for state in found]


def linear(part, x):
    return x @ np.asarray(part["kernel"], np.float64) + np.asarray(part["bias"])


def norm(part, x):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * np.asarray(part["scale"]) + np.asarray(part["bias"])


def written_out(variant, own, found, visible):
    """What the head reads of one row, token by token; `visible` [S, S]."""
    at, relu, clip = jax.tree.map, lambda x: np.maximum(x, 0), variant == "clip4clip"
    *early, last = found
    layers = [at(lambda leaf: leaf[n], own["down"]) for n in range(len(early))]  # noqa: B023
    if clip:
        tokens = [linear(down, relu(h)) for down, h in zip([*layers, own["last"]], found)]
        anchor = linear(own["anchor"], relu(last))
    else:
        norms = [at(lambda leaf: leaf[n], own["down_norm"]) for n in range(len(early))]  # noqa: B023
        tokens = [norm(scale, linear(down, h)) for down, scale, h in zip(layers, norms, early)]
        anchor = norm(own["last_norm"], linear(own["last"], last))
    out = []
    for q, seen in enumerate(visible):
        pooled = anchor[q] if clip else anchor[seen].mean(0)
        scores = np.array([(pooled * t[seen].mean(0)) @ np.asarray(own["confidence"]) for t in tokens])
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        mixed = np.zeros_like(anchor[q])
        for share, t in zip(shares, tokens):
            weights = relu(t @ anchor[q]) * seen
            mixed += share * (weights @ t / max(weights.sum(), 1e-8) + t[q])
        if clip:
            out.append(last[q] + linear(own["up"], relu(mixed)))
            continue
        project = own["project"]
        mixed = linear(project["linear"], mixed)
        mixed = linear(project["contract"], relu(mixed)) if variant == "clip_vil" else mixed
        mixed = anchor[q] + norm(project["norm"], mixed)
        out.append(linear(own["up"], relu(mixed) if variant == "vse" else mixed))
    return np.stack(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "causal"),
    [
        *((variant, False) for variant in VARIANTS),
        ("vse", True),
        *(pytest.param(variant, True, marks=pytest.mark.slow) for variant in VARIANTS[1:]),
    ],
)
def test_it_is_its_equations(variant, causal):
    model, params = tiny("encoder").forward, tiny("encoder").params
    if causal:
        model, params = decoder(tiny("backbone").forward.config, head="none"), tiny("backbone").params
    batch = {**tiny("encoder").batch, "attention_mask": MASK}
    method = pj.unipt(variant=variant)
    frozen, trainable = made(method, params)
    adapted, applied = method.model(model), method.apply(frozen, trainable)
    hidden, context = model.run_embed(params, batch)
    out = jax.jit(lambda applied: adapted.run_blocks(applied, hidden, context))(applied)
    for row, mask in enumerate(MASK):
        visible = np.broadcast_to(mask == 1, (5, 5)) & (np.tri(5) == 1 if causal else True)
        found = [state[row] for state in states(model, params, batch)]
        wanted = written_out(variant, trainable, found, visible)
        np.testing.assert_allclose(out[row], wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_rows_without_an_answer_are_zero_and_shares_are_one_together():
    keys = jnp.abs(jax.random.normal(KEY, (2, 5, 4)))
    visible = jnp.array(MASK, bool)[:, None]
    assert not interaction(-keys, keys, visible).any()
    ones = interaction(keys, jnp.ones_like(keys), visible)
    np.testing.assert_allclose(ones, 1.0, rtol=1e-6)
    moved = keys.at[1, 3:].add(1.0)  # masked keys
    np.testing.assert_array_equal(interaction(keys, moved, visible)[1], interaction(keys, keys, visible)[1])
    stack = jax.random.normal(KEY, (3, 2, 5, 4))
    shares = confidence(jnp.ones(4), keys, stack, visible)
    np.testing.assert_allclose(shares.sum(0), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(confidence(jnp.zeros(4), keys, stack, visible), jnp.full((3, 2, 1), 1 / 3))
    grads = jax.grad(lambda k: interaction(-k, k, visible & False).sum())(keys)
    assert bool(jnp.isfinite(grads).all())


def test_the_confidence_of_clip4clip_is_of_the_query_and_not_of_its_neighbors():
    """As released, where the one query is the sentence's or image's own token."""
    anchors, tokens = jax.random.normal(KEY, (2, 5, 4)), jax.random.normal(jax.random.key(1), (3, 2, 5, 4))
    visible, weights = jnp.array(MASK, bool)[:, None], jnp.arange(1.0, 5.0)
    shares = confidence(weights, anchors, tokens, visible, own_anchor=True)
    for row, mask in enumerate(MASK == 1):
        means = np.stack([np.asarray(layer)[row, mask].mean(0) for layer in tokens])
        scores = np.exp([[weights @ (anchor * mean) for anchor in anchors[row]] for mean in means])
        np.testing.assert_allclose(shares[:, row], scores / scores.sum(0), rtol=1e-4)
    moved = confidence(weights, anchors.at[:, 1].add(1.0), tokens, visible, own_anchor=True)
    np.testing.assert_array_equal(np.delete(moved, 1, axis=2), np.delete(shares, 1, axis=2))
    assert float(jnp.abs(moved - shares)[:, :, 1].max()) > 0.1


@pytest.mark.slow
def test_without_the_way_up_or_the_projection_it_is_the_last_layer():
    model, params, batch = images()
    method = pj.unipt(variant="clip4clip")
    frozen, trainable = made(method, params)
    nothing = {**trainable, "up": jax.tree.map(jnp.zeros_like, trainable["up"])}
    run = jax.jit(lambda t: method.model(model)(method.apply(frozen, t), batch))
    assert_close(run(nothing), model(params, batch), 1e-6)
    vse = pj.unipt()
    frozen, trainable = made(vse, params)
    project = {**trainable["project"], "norm": jax.tree.map(jnp.zeros_like, trainable["project"]["norm"])}
    run = jax.jit(lambda t: vse.model(model)(vse.apply(frozen, t), batch))
    downs = trainable["down"], noisy(trainable["down"], jax.random.key(3))
    one, other = ({**trainable, "project": project, "down": down} for down in downs)
    np.testing.assert_array_equal(run(one), run(other))
    assert float(jnp.abs(run(one) - run(trainable)).max()) > 1e-3


def test_its_size_is_that_of_the_released_code_but_for_a_bias_and_the_output():
    model = bert(BertConfig(vocab_size=11))
    shapes = jax.eval_shape(pj.unipt().init, KEY, jax.eval_shape(model.init, KEY))[1]

    def size(inner, out):
        down, project = 768 * inner + 3 * inner, inner * inner + 3 * inner
        return 13 * down + project + inner * out + out + inner

    assert tree.count(shapes) == size(768 // 2, 768)
    assert size(512, 1024) == 5_921_281 - 1  # there, with a bias that the softmax cancels


@pytest.mark.slow
def test_backward_keeps_the_states_and_their_narrow_form():
    shapes = kept(pj.unipt(), *images())
    assert [shape for shape in shapes if len(shape) == 4] == [(3, 2, TOKENS, 8), (3, 2, TOKENS, 16)]
    assert not [shape for shape in shapes if shape[-2:] == (TOKENS, TOKENS)]
    of_last = [(2, TOKENS, 8), (2, TOKENS, 8), (2, TOKENS, 16), (2, TOKENS, 16)]  # H_L and the head's input
    assert [shape for shape in shapes if len(shape) == 3 and shape[:2] == (2, TOKENS)] == of_last


@pytest.mark.parametrize("remat", quick_at([None, "nothing_saveable"], 0))
def test_each_weight_of_the_backbone_is_in_one_product(remat):
    model, params, batch = images(remat=remat)
    products = products_of_gradient(pj.unipt(), model, params, batch)
    count = lambda shape: sum(shape in operands for operands, _ in products)
    assert [count(shape) for shape in ((16, 16), (16, 40), (40, 16))] == [4, 1, 1]
    made_here = {result for _, result in products}
    assert not {(16, 16), (16, 40), (40, 16)} & made_here
    assert {(8, 16), (16, 8)} & made_here  # of the way up


@pytest.mark.slow
def test_bfloat16_features_give_finite_gradients_also_of_a_row_of_padding():
    model, params = tiny("encoder").forward, tiny("encoder").params
    model = dataclasses.replace(model, dtype="bfloat16")
    batch = {**tiny("encoder").batch, "attention_mask": np.array([[1] * 5, [0] * 5])}
    method = pj.unipt()
    frozen, trainable = made(method, params)
    grads = jax.jit(jax.grad(loss_of(method, model, frozen, batch)))(trainable)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_packed_texts_do_not_see_each_other():
    model, params = make_decoder()
    method = pj.unipt()
    frozen, trainable = made(method, params)
    applied = method.apply(frozen, trainable)
    run = jax.jit(lambda batch: method.model(model)(applied, batch).dense())
    ids = jnp.array([[3, 14, 15, 9, 26, 5, 35]])
    segments, places = jnp.array([[0] * 3 + [1] * 4]), jnp.array([[0, 1, 2, 0, 1, 2, 3]])
    packed = run({"input_ids": ids, "segment_ids": segments, "position_ids": places})
    assert_close(packed[:, :3], run({"input_ids": ids[:, :3]}))
    assert_close(packed[:, 3:], run({"input_ids": ids[:, 3:]}))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vse", "clip4clip"])
def test_it_generates_with_a_cache(variant):
    assert_generates_as_without_a_cache(pj.unipt(variant=variant))


@pytest.mark.slow
def test_sharded_training_is_training_on_one_device():
    assert_trains_sharded(pj.unipt())


@pytest.mark.slow
def test_a_lora_is_trained_in_the_head_and_refused_in_the_blocks():
    model, params, batch = images()
    method = pj.chain(pj.lora(rank=2, targets=["classifier"]), pj.unipt())
    frozen, trainable = made(method, params)
    grads = jax.jit(jax.grad(loss_of(method, model, frozen, batch)))(trainable)
    assert all(leaf.any() for leaf in grads["lora"]["head/classifier/kernel"].values())
    with pytest.raises(PeftError, match=r"unipt: '.*query/kernel' is trained by 'lora', but no gradient"):
        pj.chain(pj.lora(rank=2, targets=["query"]), pj.unipt()).init(KEY, params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pj.unipt(factor=0), "factor must be positive, got 0"),
        (lambda: pj.unipt(variant="vsa"), "variant must be one of vse, clip4clip, clip_vil, got 'vsa'"),
        (lambda: pj.unipt(factor=17).init(KEY, images()[1]), "factor 17 is larger than the model's width 16"),
        (lambda: pj.unipt().model(make_t5()[0]), "unipt is not for an encoder-decoder"),
        (lambda: pj.unipt().init(KEY, make_t5()[1]), "unipt is not for an encoder-decoder"),
        (lambda: pj.unipt().model(pj.vqt().model(images()[0])), "'unipt' and 'vqt' both run the blocks"),
        (lambda: pj.unipt().model(lambda params, batch: batch), "rewrites the blocks of a backbone"),
    ],
)
def test_what_it_is_not_for_is_an_error(call, message):
    with pytest.raises(PeftError, match=message):
        call()
