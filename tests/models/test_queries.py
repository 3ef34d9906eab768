"""Queries beside the tokens of a block, in every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, noisy, normal

from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config
from peftjax.models.vit import ViTConfig, vit

IDS = jax.random.randint(KEY, (2, 7), 0, 11)
PADDED = {"input_ids": IDS, "attention_mask": jnp.array([[1] * 7, [1] * 4 + [0] * 3])}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {
    "norm_order": "sandwich",
    "qk_norm": True,
    "softcap": 5.0,
    "norm": "rms_plus_one",
    "query_scale": 0.3,
}


def llama(**changes):
    config = read_config(LLAMA)
    return decoder(
        dataclasses.replace(config, block=dataclasses.replace(config.block, **changes)), head="none"
    )


def encoder():
    return bert(BertConfig(vocab_size=11, max_position_embeddings=9, **SIZES))


def images():
    return vit(ViTConfig(image_size=(4, 4), patch_size=(2, 2), **SIZES))


SEGMENTS = {"input_ids": IDS, "segment_ids": jnp.array([[0] * 3 + [1] * 4, [0] * 6 + [1]])}
CASES = {
    "encoder": (encoder, PADDED, [6, 3]),
    "images": (images, {"pixel_values": normal(KEY, (2, 3, 4, 4))}, [4, 4]),
    "decoder": (llama, PADDED, [6, 3]),
    "window": (lambda: llama(window=3), PADDED, [6, 3]),
    "sandwich": (lambda: llama(window=3, **GEMMA), PADDED, [6, 3]),
    "fused": (lambda: llama(fused_qkv=True), PADDED, [6, 3]),
    "segments": (llama, SEGMENTS, [6, 6]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_last_token_as_a_query_reads_what_it_reads_as_a_token(name):
    make, batch, last = CASES[name]
    model = make()
    params = noisy(jax.jit(model.init)(KEY))
    hidden, context = model.run_embed(params, batch)
    layer = jax.tree.map(lambda leaf: leaf[0], model.layers(params))
    rows = jnp.arange(2), np.array(last)
    wanted = model.run_layer(layer, hidden, context)[rows]
    # Another query beside it changes nothing.
    queries = jnp.stack([hidden[rows], jnp.cos(hidden[rows])], axis=1)
    got = model.run_layer(layer, queries, dataclasses.replace(context, attended=hidden))
    assert_close(got[:, 0], wanted)
    assert float(jnp.abs(got[:, 1] - wanted).max()) > 1e-2
