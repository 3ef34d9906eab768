"""Reconstruction of a backbone's blocks, one after the other."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY
from tiny_models import tiny

import peftjax as pj
from peftjax.backbone.backbone import Layer
from peftjax.calibrate import reconstruction
from peftjax.core.errors import PeftError

TOKENS = jax.random.randint(KEY, (4, 6), 0, 11)
BATCHES = [
    {"input_ids": TOKENS[:2], "attention_mask": jnp.ones((2, 6), jnp.int32).at[0, 4:].set(0)},
    {"input_ids": TOKENS[2:], "attention_mask": jnp.ones((2, 6), jnp.int32)},
]
FLEXROUND = pj.flexround(format="int3", group=-1, targets=["attention/output", "feed_forward/down"])


def backbone(layers):
    """The tiny decoder with so many blocks, and weights so large that each block matters."""
    model = tiny("backbone")
    blocks = jax.tree.map(lambda w: w[:layers] * (4 if w.ndim == 3 else 1), model.params["blocks"])
    params = {**model.params, "blocks": blocks}
    return dataclasses.replace(model.forward, num_layers=layers), params


def streams(model):
    """What gives the hidden states after each block."""

    @jax.jit
    def run(params, batch):
        hidden, context = model.run_embed(params, batch)
        found, layers = [], model.layers(params)
        for number in range(model.num_layers):
            layer = jax.tree.map(lambda leaf, number=number: leaf[number], layers)
            hidden = model.run_layer(Layer(*layer), hidden, context)
            found.append(hidden)
        return found

    return run


def reconstruct(model, params, method, tx=None, **options):
    tx = tx or optax.adam(optax.cosine_decay_schedule(1e-2, 30))
    given = {"steps": 30, "key": KEY, "progress": False, **options}
    return pj.calibrate.reconstruct(method, model, params, BATCHES, tx, **given)


@pytest.fixture
def watched(monkeypatch, caplog):
    """`[(compiled so far, the training)]` at the start of each block."""
    begun, made = [], reconstruction.training

    def training(*args):
        inner = made(*args)
        begin = inner.begin

        def counted(*parts):
            begun.append((sum("ompiling" in line.getMessage() for line in caplog.records), inner))
            return begin(*parts)

        object.__setattr__(inner, "begin", counted)
        return inner

    monkeypatch.setattr(reconstruction, "training", training)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        yield begun


@pytest.mark.slow
def test_each_block_comes_nearer_to_its_output_and_a_second_one_compiles_nothing(watched):
    model, params = backbone(3)
    found = reconstruct(model, params, FLEXROUND)
    (none, train), (first, _), (second, _) = watched
    assert none < first == second
    assert train._stepped._cache_size() == 1
    assert all(after < 0.97 * before for before, after in zip(found.before, found.after)), found[2:]
    # Of the model that is returned, from its definition.
    merged = FLEXROUND.merge(found.frozen, found.trainable)
    errors, counts, run = np.zeros(3), 0, streams(model)
    for batch in BATCHES:
        mask = np.asarray(batch["attention_mask"], bool)
        errors += [np.sum(np.square(a - b)[mask]) for a, b in zip(run(merged, batch), run(params, batch))]
        counts += mask.sum()
    np.testing.assert_allclose(found.after, errors / counts, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pj.quantized(format="int3", group=-1, train=True),
        pj.peqa(format="int3"),
        pj.flexround(format="int3", group=-1, rank=2),
        pj.chain(pj.quantized(format="int3", group=-1), pj.lora(rank=2)),
    ],
    ids=lambda method: "-".join(method.parts or [method.name]),
)
def test_any_method_of_blocks_is_trained_and_the_whole_model_comes_nearer(method):
    model, params = backbone(2)
    found = reconstruct(model, params, method, input_prob=1.0)
    assert all(after < before for before, after in zip(found.before, found.after)), found[2:]
    start = method.init(KEY, params)

    def error(merged):
        return sum(float(jnp.mean((model(merged, b) - model(params, b)) ** 2)) for b in BATCHES)

    assert error(method.merge(found.frozen, found.trainable)) < error(method.merge(*start))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask_lora", "scale_lora"])
def test_a_pruned_model_follows_the_blocks_of_the_whole_one_and_keeps_its_zeros(name):
    model, params = backbone(2)
    blocks = jax.tree.map(
        lambda w: w * (jnp.abs(w) > jnp.quantile(jnp.abs(w), 0.5)) if w.ndim == 3 else w, params["blocks"]
    )
    sparse = {**params, "blocks": blocks}
    method = pj.METHODS[name].factory(rank=4, targets=["attention/output", "feed_forward/down"])
    found = reconstruct(model, sparse, method, input_prob=1.0, like=params)
    assert all(after < 0.97 * before for before, after in zip(found.before, found.after)), found[2:]
    merged = method.merge(found.frozen, found.trainable)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new == 0, old == 0), merged, sparse)
    run = streams(model)
    first, masks = (
        [run(merged, b)[0] - run(params, b)[0] for b in BATCHES],
        [b["attention_mask"] for b in BATCHES],
    )
    error = sum(float(jnp.sum(d**2 * m[..., None])) for d, m in zip(first, masks)) / sum(
        m.sum() for m in masks
    )
    np.testing.assert_allclose(found.after[0], error, rtol=2e-3)


@pytest.mark.slow
def test_a_block_that_its_training_takes_further_away_stays_as_it_starts():
    model, params = backbone(2)
    found = reconstruct(model, params, FLEXROUND, optax.sgd(-1.0), steps=5)
    assert found.before == found.after
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found.trainable))


def test_it_refuses_what_it_cannot_reconstruct():
    model, params = backbone(2)
    with pytest.raises(PeftError, match="in no block; exclude it"):
        reconstruct(model, params, pj.unfreeze(["head/norm/scale"]))
    with pytest.raises(PeftError, match="trains nothing"):
        reconstruct(model, params, pj.quantized(targets=["query"]))
    with pytest.raises(PeftError, match="input_prob"):
        reconstruct(model, params, FLEXROUND, input_prob=2.0)
    with pytest.raises(PeftError, match="no batch"):
        pj.calibrate.reconstruct(FLEXROUND, model, params, [], optax.sgd(1.0), steps=1, key=KEY)
    with pytest.raises(PeftError, match="use a method of weights"):
        pj.calibrate.reconstruct(FLEXROUND, lambda *a: a, params, BATCHES, optax.sgd(1.0), steps=1, key=KEY)
