"""A plan on a mesh has the sizes of one device, and what passes between all."""

import jax
import jax.numpy as jnp
import optax
import pytest
from meshes import MODEL

import peftjax as pj
from peftjax.core import tree


def test_sizes_are_those_of_one_device():
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    found = pj.plan(
        pj.lora(rank=4),
        MODEL,
        MODEL.shapes,
        {"input_ids": ids, "labels": ids},
        optimizer=optax.adamw(1e-3),
        mesh="fsdp=8",
    )
    whole = tree.nbytes(MODEL.shapes)
    vectors = sum(leaf.size * 4 for leaf in jax.tree.leaves(MODEL.shapes) if min(leaf.shape) <= 2)
    assert whole / 8 <= found.bytes.weights <= whole / 8 + vectors
    assert found.devices == 8
    assert found.collectives["all-gather"].nbytes > whole
    assert "8 x cpu, each" in str(found)
    assert "all-gather" in str(found)


def test_a_mesh_of_other_devices_than_the_targets():
    with pytest.raises(pj.PeftError, match="of 16 devices and there are 8"):
        pj.plan(pj.lora(), MODEL, MODEL.shapes, {}, optimizer=optax.sgd(1.0), mesh="fsdp=16")
