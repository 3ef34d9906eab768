"""A QLoRA step of a Llama of 7B widths, compiled for two accelerators: no weight is there as floats."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from kernels.targets import compiled
from kernels.test_dequantized_matmul_compile import calls, largest_float

import peftjax as pj
from peftjax.models import llama
from peftjax.models.decoder import decoder

pytestmark = pytest.mark.slow
WIDTH, INNER, LENGTH = 4096, 11_008, 256
CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "intermediate_size": INNER,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("remat", [None, "nothing_saveable"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_weight_is_decoded_as_a_whole(platform, remat):
    """Each layer's seven products are kernels, forward and backward; the largest float is an activation."""
    model = decoder(llama.read_config(CONFIG), head="causal_lm", dtype="bfloat16")
    model = dataclasses.replace(model, remat=remat)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.shapes)
    method = pj.chain(pj.nf4(), pj.lora(rank=16))
    frozen, trainable = jax.eval_shape(method.init, jax.random.key(0), params)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    run = pj.adapt(method.model(model))

    def step(trainable, frozen, tokens):
        def loss(trainable):
            batch = {"input_ids": tokens, "labels": tokens}
            logits = run(method.apply(frozen, trainable), batch)
            return pj.losses.cross_entropy(logits, batch)

        return jax.value_and_grad(loss)(trainable)

    program = compiled(step, (trainable, frozen, tokens), platform)
    assert largest_float(program) < WIDTH * WIDTH
    assert calls(program, platform) >= 2 * 7
    # The activations of both layers, and a few of one: less than one decoded layer.
    a_layer = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    assert program.memory_analysis().temp_size_in_bytes < a_layer / 2
