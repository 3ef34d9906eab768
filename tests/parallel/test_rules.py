"""Where parameters lie: by rules, in parts that fit, codes as their weights."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from meshes import MODEL

import peftjax as pj
from peftjax.core import tree
from peftjax.parallel import make_mesh, shard, shardings

OWN = {"dense": {"w": jnp.ones((8, 6)), "b": jnp.ones(6)}}


def test_the_blocks_of_a_backbone():
    mesh = make_mesh("fsdp=4,tensor=2")
    specs = {path: place.spec for path, place in tree.named_leaves(shardings(MODEL.shapes, mesh)).items()}
    assert specs["blocks/attention/query/kernel"] == P(None, "fsdp", "tensor")
    assert specs["blocks/attention/output/kernel"] == P(None, "tensor", "fsdp")
    assert not any(specs["blocks/attention_norm/scale"])
    assert specs["embed/word/embedding"] == P("tensor", "fsdp")


@pytest.mark.slow
def test_codes_lie_as_their_weight():
    mesh = make_mesh("fsdp=4,tensor=2")
    frozen, _ = pj.quantized(format="int8", group=16).init(jax.random.key(0), MODEL.init(jax.random.key(0)))
    placed = shard(frozen.params, mesh)
    codes = placed["blocks"]["attention"]["query"]["kernel"].codes.codes
    assert codes.addressable_shards[0].data.size * 8 == codes.size


def test_rules_of_ones_own(caplog):
    mesh = make_mesh("fsdp=4,tensor=2")
    with caplog.at_level(logging.WARNING):
        placed = shard(OWN, mesh, [(".*/w", ("fsdp", "tensor")), (".*/b", ("fsdp",))])
    assert placed["dense"]["w"].sharding.spec == P("fsdp", "tensor")
    assert placed["dense"]["b"].sharding.spec == P(None)  # 4 does not divide 6
    assert "dense/b" in caplog.text
    assert "dense/w" not in caplog.text


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(".*/v", ("fsdp",))], "rule '.*/v' matches no parameter"),
        ([(".*/w", ("model",))], "is to lie over 'model', and the mesh has data, fsdp"),
        ([(".*/b", ("fsdp", "tensor"))], "'dense/b' has 2 axes"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(pj.PeftError, match=message):
        shard(OWN, make_mesh("fsdp=4,tensor=2"), rules)
