"""What a TPU's compiler lets pass between eight chips in a step, by kind and bytes."""

import jax
import jax.numpy as jnp
import optax
import pytest

import peftjax as pj
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config

pytest.importorskip("libtpu", reason="a TPU's compiler: pip install libtpu")
pytestmark = pytest.mark.slow
ROWS, LENGTH, LAYERS, WIDTH, RANK = 8, 256, 3, 512, 8
MODEL = decoder(
    read_config(
        {
            "model_type": "llama", "vocab_size": 1024, "hidden_size": WIDTH, "intermediate_size": 1024,
            "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
        }
    ),
    head="causal_lm",
    dtype="bfloat16",
)  # fmt: skip
SHAPES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), MODEL.shapes)
WEIGHTS = sum(2 * leaf.size for leaf in jax.tree.leaves(SHAPES) if leaf.ndim > 1)


def of_step(method, mesh):
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = {"input_ids": ids, "labels": ids}
    found = pj.plan(method, MODEL, SHAPES, batch, optimizer=optax.adamw(1e-3), target="v5e:2x4", mesh=mesh)
    return {kind: traffic.nbytes for kind, traffic in found.collectives.items()}, found.trainable_parameters


@pytest.mark.parametrize("name", ["lora", "nf4", "houlsby", "lst"])
def test_fsdp_gathers_weights_or_codes_and_sums_gradients_alone(name):
    methods = {
        "lora": pj.lora(rank=RANK),
        "nf4": pj.chain(pj.nf4(), pj.lora(rank=RANK)),
        "houlsby": pj.houlsby(size=16),
        "lst": pj.lst(reduction=4),
    }
    found, trained = of_step(methods[name], "fsdp=8")
    # Codes are a quarter of bfloat16, but the word table and the output layer stay floats.
    passes = {"lst": 1, "nf4": 0.6}.get(name, 2)
    assert found.pop("all-gather") <= passes * WEIGHTS + 4 * trained + 4 * ROWS * LENGTH
    assert found.pop("all-to-all") <= 2 * LENGTH * WIDTH
    assert sum(found.values()) <= 4 * trained + 64


def test_tensor_parallelism_sums_each_branch_and_nothing_wider_than_the_stream():
    found, trained = of_step(pj.lora(rank=RANK), "fsdp=2,tensor=4")
    stream = 2 * (ROWS // 2) * LENGTH * WIDTH
    thin = 14 * LAYERS * 4 * (ROWS // 2) * LENGTH * RANK
    # Forward two branches a layer. Backward the inputs of the five matrices divided by outputs are summed one
    # by one, as the thin products of the adapter lie between them.
    assert found["all-reduce"] <= (2 + 5) * LAYERS * stream + 2 * stream + 4 * trained + thin
    assert found["all-gather"] <= WEIGHTS // 2 + 4 * trained
