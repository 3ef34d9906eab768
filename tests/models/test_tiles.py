"""A feed-forward that takes some of the tokens at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_coded_blocks import BATCH, KEY, B, S, encoder, llama, made, step
from support import assert_close

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.planner.residuals import kept_arrays

INNER = 96
METHODS = {"lora": pj.lora(rank=2), "full": pj.full(), "meft": pj.meft(size=2), "houlsby": pj.houlsby(size=2)}


def tiled(model, tile):
    return dataclasses.replace(model, feed_forward_tile=tile)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "lora"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [
                ("llama", "full"),
                ("llama", "meft"),
                ("llama", "houlsby"),
                ("encoder", "lora"),
                ("sandwich", "lora"),
                ("t5", "lora"),
            ]
        ),
    ],
)
def test_values_and_gradients_are_those_of_all_tokens_at_once(family, method):
    model, params, batch = made(family)
    value, grads = step(METHODS[method], model, params, batch)
    found, same = step(METHODS[method], tiled(model, 5), params, batch)  # three tiles and a rest
    assert_close(found, value, 1e-6)
    assert_close(same, grads, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["nothing_saveable", "offload_attention"])
def test_it_goes_with_a_policy(remat):
    _, params, batch = made("llama")
    value, grads = step(METHODS["lora"], llama(), params, batch)
    model = dataclasses.replace(llama(), remat=remat, feed_forward_tile=5)
    found, same = step(METHODS["lora"], model, params, batch)
    assert_close(found, value, 1e-6)
    assert_close(same, grads, 1e-5)


def test_backward_keeps_no_inner_activation():
    params = made("llama")[1]

    def inner(tile):
        model = tiled(llama(), tile)
        loss = lambda params: pj.losses.cross_entropy(model(params, BATCH), BATCH)
        return [x for x in kept_arrays(loss, params) if x.shape[1:] == (B, S, INNER)]

    assert len(inner(None)) == 2  # what enters the activation
    assert not inner(4)
    assert not inner(5)


@pytest.mark.slow
def test_the_compiler_needs_less_for_a_long_row():
    model = dataclasses.replace(llama(layers=2, width=32, inner=1024), remat="nothing_saveable")
    shapes = jax.eval_shape(model.init, KEY)
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(params, batch, tile):
        return pj.losses.cross_entropy(tiled(model, tile)(params, batch), batch)

    def temporaries(tile):
        program = jax.jit(jax.grad(loss), static_argnums=2)
        batch = {"input_ids": tokens, "labels": tokens}
        return program.lower(shapes, batch, tile).compile().memory_analysis().temp_size_in_bytes

    inner = 4096 * 1024 * 4
    assert temporaries(None) - temporaries(256) > 2 * inner


@pytest.mark.slow
def test_each_tile_drops_its_own():
    model = tiled(encoder(layers=1, rate=0.5), 4)
    _, params, _ = made("encoder")
    params = {**params, "blocks": jax.tree.map(lambda w: w[:1], params["blocks"])}
    same = {"input_ids": jnp.full((B, S), 7), "position_ids": jnp.zeros((B, S), jnp.int32)}
    out = jax.jit(model.run_embed)(params, same, key=None)
    hidden = model.run_blocks(params, out[0], out[1], key=KEY)
    assert jnp.isfinite(hidden).all()
    assert float(jnp.abs(hidden[:, :4] - hidden[:, 4:8]).max()) > 1e-3


@pytest.mark.slow
def test_a_tile_of_nothing_is_an_error_and_an_encoder_follows():
    with pytest.raises(PeftError, match=r"feed_forward_tile must be positive"):
        tiled(llama(), 0)
    assert tiled(made("t5")[0], 8).encoder.block.config.feed_forward_tile == 8
    assert tiled(tiled(llama(), 8), None).block.config == llama().block.config
    np.testing.assert_array_equal(tiled(llama(), 4).init(KEY)["head"]["norm"]["scale"], 1)
