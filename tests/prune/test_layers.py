"""Layers and experts that do nothing are found, and those that are skipped cost one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import batch_of, make
from support import noisy

import peftjax as pj
from peftjax.core import tree


def without_layer(params, layer):
    """The parameters in which a layer adds nothing to the stream."""
    last = ("blocks/attention/output/", "blocks/feed_forward/down/")
    leaves = {path: jnp.asarray(leaf) for path, leaf in tree.named_leaves(params).items()}
    return tree.replace(
        params, {path: leaf.at[layer].set(0) for path, leaf in leaves.items() if path.startswith(last)}
    )


def mean_square(model, batch, params):
    return jnp.mean(jnp.square(model(params, batch)) * jnp.arange(16))


def test_a_layer_that_adds_nothing_scores_zero_and_skipping_is_one_program():
    model, params = make("llama")
    batch = batch_of("llama")
    params = without_layer(params, 1)
    skipping, traces = pj.prune.skippable(model), []

    def loss(kept, batch):
        traces.append(1)
        return mean_square(skipping, batch, pj.prune.with_layers(params, kept))

    scores = pj.prune.layer_scores(loss, 3, [batch, batch])
    assert len(traces) == 1
    assert scores[1] == 0
    assert np.abs(scores[jnp.array([0, 2])]).min() > 1e-3
    groups = {"layers": pj.prune.groups_of(model, params)["layers"]}
    kept = pj.prune.select({"layers": jnp.abs(scores)}, 2)
    assert kept["layers"].tolist() == [True, False, True]
    small = pj.prune.sliced(model, params, groups, kept)
    got, want = jax.jit(small.model)(small.params, batch), jax.jit(model)(params, batch)
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(pj.PeftError, match="there is no batch"):
        pj.prune.layer_scores(loss, 3, [])


@pytest.mark.slow
def test_a_layer_whose_adapter_was_not_trained_scores_zero():
    model, params = make("llama")
    batch = batch_of("llama")
    for method in (pj.lora(rank=2), pj.adaptformer(size=2)):
        frozen, start = method.init(jax.random.key(0), params)
        trained = jax.tree.map(lambda leaf, first: leaf.at[2].set(first[2]), noisy(start), start)
        run = pj.adapt(method.model(model))

        def loss(kept, batch, run=run, method=method, frozen=frozen, trained=trained, start=start):
            own = pj.prune.reset_layers(trained, start, kept)
            return mean_square(run, batch, method.apply(frozen, own))

        scores = pj.prune.layer_scores(loss, 3, [batch])
        assert scores[2] == 0
        assert np.abs(scores[:2]).min() > 1e-5
    with pytest.raises(pj.PeftError, match="nothing trained below 'layers' has 3 layers"):
        pj.prune.reset_layers(trained, start, jnp.ones(3, bool), stack="layers")


@pytest.mark.slow
def test_experts_that_no_token_chooses_are_found_and_their_loss_changes_nothing():
    model, params = make("gpt_oss")
    batch = batch_of("gpt_oss")
    leaves = tree.named_leaves(params)
    useless = [3, 0, 2]  # one of each layer
    path = "blocks/feed_forward/router/bias"
    bias = jnp.asarray(leaves[path]).at[jnp.arange(3), jnp.array(useless)].set(-1e3)
    params = tree.replace(params, {path: bias})
    scores = pj.prune.router_scores(model, params, [batch, batch], chosen=2)
    assert scores["experts"].shape == (3, 4)
    assert [int(own.argmin()) for own in scores["experts"]] == useless
    assert (scores["experts"][jnp.arange(3), jnp.array(useless)] == 0).all()
    first = pj.prune.router_scores(model, params, [batch])["experts"]
    assert (first.sum(-1) <= 1).all()
    groups = {"experts": pj.prune.groups_of(model, params)["experts"]}
    kept = pj.prune.select(scores, 3)
    small = pj.prune.sliced(model, params, groups, kept)
    assert small.model.block.config.experts.count == 3
    want = jax.jit(model)(params, batch)
    tokens = batch["attention_mask"] != 0  # padding may have chosen an expert that no token did
    got = jax.jit(small.model)(small.params, batch)
    np.testing.assert_allclose(np.asarray(got)[tokens], np.asarray(want)[tokens], atol=1e-6)
    with pytest.raises(pj.PeftError, match="chosen must be from 1 to the 4 experts"):
        pj.prune.router_scores(model, params, [batch], chosen=5)
    with pytest.raises(pj.PeftError, match="there is no batch"):
        pj.prune.router_scores(model, params, [])
