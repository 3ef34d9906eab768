"""A trained adapter on a mesh: what it writes, and where it lies when merged."""

import dataclasses

import jax
import numpy as np
import pytest
from meshes import CONFIG, MODEL
from support import noisy

import peftjax as pj
from peftjax.core import tree
from peftjax.parallel import make_mesh, shard, shard_batch, shardings

METHOD = pj.chain(pj.nf4(), pj.lora(rank=4))


def prompts(rows):
    rng = np.random.default_rng(0)
    mask = np.ones((rows, 12), np.int32)
    mask[::2, :5] = 0
    return {
        "input_ids": rng.integers(0, CONFIG["vocab_size"], mask.shape).astype(np.int32),
        "attention_mask": mask,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "rows"), [("data=2,fsdp=2,tensor=2", 8), ("fsdp=8", 3), ("tensor=4,sequence=2", 2)]
)
def test_a_mesh_writes_what_one_device_writes(sizes, rows):
    params = MODEL.init(jax.random.key(0))
    frozen, trainable = METHOD.init(jax.random.key(1), params)
    trainable = noisy(trainable, scale=0.3)
    wanted = pj.generate(MODEL, METHOD.apply(frozen, trainable), prompts(rows), max_new_tokens=6)
    mesh = make_mesh(sizes)
    model = dataclasses.replace(MODEL, mesh=mesh)
    on_mesh = dataclasses.replace(frozen, params=shard(frozen.params, mesh))
    batch = shard_batch(prompts(rows), mesh)
    found = pj.generate(model, METHOD.apply(on_mesh, trainable), batch, max_new_tokens=6)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)


def test_a_merged_weight_lies_where_its_base_does():
    mesh = make_mesh("fsdp=4,tensor=2")
    params = shard(MODEL.init(jax.random.key(0)), mesh)
    method = pj.lora(rank=4)
    frozen, trainable = method.init(jax.random.key(1), params)
    trainable = noisy(trainable, scale=0.3)
    merged = method.merge(frozen, trainable)
    places = tree.named_leaves(shardings(params, mesh))
    for path, leaf in tree.named_leaves(merged).items():
        assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), path
