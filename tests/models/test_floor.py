"""What the compiler reserves for a LoRA step: the activations that any method must keep, and no more.

The floor of L layers and T tokens, in bytes of the compute dtype (see `peftjax.backbone.block`):

    L T (2 D + 2 q + 2 k + n F) itemsize,   n = 2 when gated, else 1, q = N H, k = K H

and 2 D more in a post-norm block. What one layer needs while it works, and one part of the loss, comes once.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import peftjax as pj
from peftjax.core import compat
from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config

B, S, D, F, N, K, V = 16, 192, 128, 344, 8, 4, 1000
METHOD = pj.lora(rank=2)
TX = METHOD.optimizer(optax.adamw(1e-3))
LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "max_position_embeddings": S,
}
PER_TOKEN = {"llama": 2 * D + 2 * D + 2 * (K * D // N) + 2 * F, "bert": 4 * D + 2 * D + 2 * D + F}


def model_of(family, layers, dtype):
    if family == "llama":
        return decoder(read_config({**LLAMA, "num_hidden_layers": layers}), dtype=dtype)
    config = BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=N, intermediate_size=F
    )
    return bert(config, head="masked_lm", dtype=dtype)


def step_inputs(family, layers, dtype):
    """Shapes of trainable, optimizer state, frozen and batch of a LoRA step."""
    params = jax.eval_shape(model_of(family, layers, dtype).init, jax.random.key(0))
    frozen, trainable = jax.eval_shape(METHOD.init, jax.random.key(0), params)
    tokens = jax.ShapeDtypeStruct((B, S), jnp.int32)
    return trainable, jax.eval_shape(TX.init, trainable), frozen, {"input_ids": tokens, "labels": tokens}


def loss_of(model):
    def loss(trainable, frozen, batch):
        return pj.losses.cross_entropy(pj.adapt(model)(METHOD.apply(frozen, trainable), batch), batch)

    return loss


@functools.cache
def compiled(family, layers, dtype="float32"):
    """A whole LoRA step, compiled from shapes alone."""
    loss = loss_of(model_of(family, layers, dtype))

    def step(trainable, state, frozen, batch):
        value, gradients = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, state = TX.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1)).lower(*step_inputs(family, layers, dtype)).compile()


def temporaries(*args):
    return compiled(*args).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_layer_adds_the_floor_and_at_most_five_percent(family):
    floor = B * S * PER_TOKEN[family] * 4
    per_layer = (temporaries(family, 80) - temporaries(family, 4)) / 76
    assert floor <= per_layer <= 1.05 * floor


def test_eighty_layers_are_within_five_percent_of_the_floor():
    floor = 80 * B * S * PER_TOKEN["llama"] * 4
    assert floor <= temporaries("llama", 80) <= 1.05 * floor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scan_keeps_the_floor_in_the_compute_dtype(dtype):
    # Counted in the traced program: a CPU's compiler widens bfloat16 arrays again.
    layers = 5
    model, inputs = model_of("llama", layers, dtype), step_inputs("llama", layers, dtype)
    trainable, _, frozen, batch = inputs
    jaxpr = jax.make_jaxpr(jax.grad(loss_of(model), argnums=0))(trainable, frozen, batch)
    kept = [
        variable.aval
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "scan" and eqn.params["length"] == layers and not eqn.params["reverse"]
        for variable in eqn.outvars[len(compat.split_scan(eqn.params, eqn.invars)[1]) :]
    ]
    numbers = layers * B * S * PER_TOKEN["llama"]
    activations = [aval for aval in kept if aval.size >= layers * B * S]
    assert {aval.dtype.name for aval in activations} == {dtype}
    assert numbers <= sum(aval.size for aval in activations) <= 1.02 * numbers


def test_neither_logits_nor_attention_weights_exist_whole():
    text = compiled("llama", 4).as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"[fs]\d+\[([\d,]+)\]", text)}
    of_vocabulary = [shape for shape in shapes if V in shape]
    assert of_vocabulary
    tokens = [shape for shape in of_vocabulary if D not in shape]
    assert max(map(_size, tokens), default=0) < B * S * V
    # The kept arrays carry a number of layers in front; attention weights would carry S twice.
    assert not [shape for shape in shapes if shape.count(S) >= 2 and _size(shape) >= B * N * S * S]


def _size(shape):
    size = 1
    for dim in shape:
        size *= dim
    return size
