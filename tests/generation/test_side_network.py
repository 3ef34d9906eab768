"""Decoding with a side network: two caches are what the whole sequence gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5
from support import KEY, assert_close
from tiny_decoder import PROMPTS, make_decoder, padded, without_cache
from tiny_models import moved

import peftjax as pj
from peftjax.generation.decode import start

NEW = 5
OPTIONS = {
    "every layer": {"side": pj.lora(rank=2)},
    "some layers": {"side_layers": [1], "merge_last": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_generation_is_teacher_forcing(name):
    model, params = make_decoder(per_layer={"window": (4, 100, 3)})
    method = pj.lst(reduction=2, **OPTIONS[name])
    frozen, trainable = jax.jit(method.init)(KEY, params)
    model, params = method.model(model), method.apply(frozen, moved(trainable))
    forced = lambda params, batch: pj.adapt(model)(params, batch)
    tokens, lead = without_cache(forced, params, PROMPTS, NEW)
    assert lead > 1e-3
    made = pj.generate(model, params, padded(PROMPTS), max_new_tokens=NEW)
    np.testing.assert_array_equal(made.tokens, tokens)


@pytest.mark.slow
def test_the_caches_are_those_of_the_layers_that_are_run():
    model, params = make_decoder()
    method = pj.lst(reduction=2, side_layers=[1])
    params = method.apply(*jax.jit(method.init)(KEY, params))
    batch = {"input_ids": np.array(PROMPTS[:1])}
    cache = jax.eval_shape(lambda p: start(method.model(model), p, batch, room=3)[1].cache, params)
    # Two layers of two heads of 8, and one of two heads of 4, for 7 + 3 places.
    assert {leaf.shape for leaf in jax.tree.leaves(cache["backbone"])} == {(2, 1, 2, 10, 8)}
    assert {leaf.shape for leaf in jax.tree.leaves(cache["side"])} == {(1, 1, 2, 10, 4)}


@pytest.mark.slow
def test_an_encoder_decoder_decodes_as_it_is_forced():
    """A token at a time, with the rows of the two biases that belong to it."""
    model, params = tiny_t5.make()
    method = pj.lst(reduction=2, side_layers=[1])
    frozen, trainable = jax.jit(method.init)(KEY, params)
    model, params = method.model(model), method.apply(frozen, moved(trainable))
    batch = tiny_t5.token_batch()
    hidden, context = jax.jit(model.run_embed)(params, batch)
    wanted = jax.jit(model)(params, batch).dense()
    context = dataclasses.replace(context, mask=jnp.ones(hidden.shape[:2], bool))

    @jax.jit
    def step(token, cache):
        rows = lambda bias: jax.lax.dynamic_slice_in_dim(bias, token, 1, 2)
        biases = {"bias": rows(context.bias), "side_bias": rows(context.side_bias)}
        own = dataclasses.replace(context, **biases, cache_index=token)
        new = jax.lax.dynamic_slice_in_dim(hidden, token, 1, 1)
        out, cache = model.run_blocks_cached(params, new, own, cache)
        return model.run_head(params, out, own).dense(), cache

    made, cache = [], model.empty_cache(params, hidden[:, :1], dataclasses.replace(context, cache_index=0))
    for token in range(hidden.shape[1]):
        logits, cache = step(jnp.int32(token), cache)
        made.append(logits)
    assert_close(jnp.concatenate(made, 1), wanted)
