"""What a TPU's compiler lets pass between eight chips in a step, by kind and bytes."""

import jax
import jax.numpy as jnp
import optax
import pytest

import peftjax as pj
from peftjax.core import tree
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config
from peftjax.models.mixtral import MIXTRAL

pytest.importorskip("libtpu", reason="a TPU's compiler: pip install libtpu")
pytestmark = pytest.mark.slow
ROWS, LENGTH, LAYERS, WIDTH, RANK = 8, 256, 3, 512, 8
SETTINGS = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": WIDTH, "intermediate_size": 1024,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
}  # fmt: skip
MODEL = decoder(read_config(SETTINGS), head="causal_lm", dtype="bfloat16")
SHAPES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), MODEL.shapes)
WEIGHTS = sum(2 * leaf.size for leaf in jax.tree.leaves(SHAPES) if leaf.ndim > 1)


def of_step(method, mesh, model=MODEL, shapes=SHAPES):
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = {"input_ids": ids, "labels": ids}
    found = pj.plan(method, model, shapes, batch, optimizer=optax.adamw(1e-3), target="v5e:2x4", mesh=mesh)
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
    thin = 2 * LAYERS * 4 * (ROWS // 2) * LENGTH * RANK
    # Two branches a layer, forward and backward; the words.
    assert 4 * LAYERS * stream <= found["all-reduce"]
    assert found["all-reduce"] <= 4 * LAYERS * stream + 2 * stream + 4 * trained + thin
    assert found["all-gather"] <= WEIGHTS // 2 + 4 * trained


def test_matrices_of_experts_stay_where_they_lie():
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    model = MIXTRAL.build(
        MIXTRAL.read_config({**SETTINGS, "model_type": "mixtral", **experts}), dtype="bfloat16"
    )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.shapes)
    others = {path: leaf for path, leaf in tree.named_leaves(shapes).items() if "/experts/" not in path}
    method = pj.lora(rank=RANK, targets=".*(attention|experts).*")
    found, trained = of_step(method, "expert=8", model, shapes)
    stream = 2 * ROWS * LENGTH * WIDTH  # of the eight chips that share experts
    small = 4 * trained + 8 * LAYERS * 4 * ROWS * LENGTH
    gathered = 2 * sum(2 * leaf.size for leaf in others.values()) + 3 * LAYERS * stream
    assert found["all-gather"] <= gathered + small
    assert LAYERS * stream < found["reduce-scatter"] <= 2 * LAYERS * stream + small
    assert found.get("all-reduce", 0) <= small
