"""Prompt tokens of S2A: rows that the blocks read and the head does not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from support import KEY, assert_close
from tiny_models import BLOCKS, WIDTH, tiny

import peftjax as pj
from peftjax.core.errors import PeftError

ENCODER = tiny("encoder")
METHOD = pj.s2a(biases=False, side=0, prompts=2, residuals={"attention": 32, "norm": 32, "activation": 32})


def run_of(params, trained, batch):
    frozen = METHOD.init(KEY, params)[0]
    return METHOD.model(ENCODER.forward)(METHOD.apply(frozen, trained), batch)


@pytest.mark.slow
def test_they_are_tokens_after_those_of_the_row():
    """As if the embeddings had given them, and a mask that shows them to all."""
    trained = {"prompts": jax.random.normal(KEY, (2, WIDTH))}
    model, batch = ENCODER.forward, {**ENCODER.batch, "attention_mask": jnp.array([[1] * 5, [1, 1, 1, 0, 0]])}
    hidden, context = model.run_embed(ENCODER.params, batch)
    hidden = jnp.concatenate([hidden, jnp.broadcast_to(trained["prompts"], (2, 2, WIDTH))], axis=1)
    context = dataclasses.replace(
        context, mask=jnp.concatenate([context.mask, jnp.ones((2, 2), bool)], axis=1)
    )
    for number in range(BLOCKS):
        layer = jax.tree.map(lambda leaf, n=number: leaf[n], model.layers(ENCODER.params))
        hidden = model.run_layer(layer, hidden, context)
    assert_close(run_of(ENCODER.params, trained, batch), hidden[:, :5])


@pytest.mark.slow
def test_they_alone_are_trained_and_the_gradient_reaches_them():
    frozen, trained = METHOD.init(KEY, ENCODER.params)
    assert jax.tree.map(jnp.shape, trained) == {"prompts": (2, WIDTH)}
    weight = jax.random.normal(KEY, (2, 5, WIDTH))
    grads = jax.grad(lambda t: jnp.sum(weight * run_of(ENCODER.params, t, ENCODER.batch)))(trained)
    assert bool((jnp.abs(grads["prompts"]).max(axis=1) > 0).all())
    assert all(leaf is base for leaf, base in zip(jax.tree.leaves(frozen), jax.tree.leaves(ENCODER.params)))


def test_where_they_have_no_place_it_says_so():
    backbone = tiny("backbone")
    with pytest.raises(PeftError, match="s2a: prompts come last, and no token of a causal stack reads them"):
        pj.s2a(prompts=2).model(backbone.forward)
    with pytest.raises(PeftError, match="s2a: prompts must be 0 or more, got -1"):
        pj.s2a(prompts=-1)
