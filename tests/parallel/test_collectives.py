"""What passes between devices in a step: weights, and thin sums, but no activation."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import CONFIG, begun
from test_same_run import METHODS

import peftjax as pj
from peftjax.core import tree
from peftjax.parallel import make_mesh
from peftjax.planner.collectives import KINDS, collectives
from peftjax.train.step import divided

ROWS, LENGTH, RANK = 8, 48, 4


def of_step(method, sizes, length=LENGTH, rows=ROWS, **options):
    run, state, batch = begun(method, make_mesh(sizes), rows=rows, length=length, **options)
    inputs = state.trainable, state.opt_state, *divided(state.frozen, run.moves), batch
    step = jax.jit(partial(run.run_step, key=None), donate_argnums=(0, 1, 2))
    return collectives(step.lower(*inputs).compile().as_text()), state


def test_every_turn_of_a_loop_is_counted():
    mesh = make_mesh("fsdp=8")

    @jax.jit
    def summed(x):
        def turn(total, row):
            whole = jax.lax.with_sharding_constraint(row, NamedSharding(mesh, P()))
            return total * 0.5 + whole, None

        return jax.lax.scan(turn, jnp.zeros(64), x)[0]

    x = jax.device_put(jnp.ones((5, 64)), NamedSharding(mesh, P(None, "fsdp")))
    found = [one for one in collectives(summed.lower(x).compile().as_text()) if one.kind == "all-gather"]
    assert sum(one.runs * one.nbytes for one in found) == 5 * 64 * 4


def test_fsdp_gathers_each_weight_twice_and_no_activation():
    found, state = of_step(pj.lora(rank=RANK), "fsdp=8")
    gathered = sum(one.runs * one.nbytes for one in found if one.kind == "all-gather")
    matrices = {path: leaf for path, leaf in tree.named_leaves(state.frozen.params).items() if leaf.ndim > 1}
    weights, trained = tree.nbytes(matrices), tree.nbytes(state.trainable)
    ids = 4 * ROWS * LENGTH
    assert gathered <= 2 * (weights + trained) + ids
    assert weights - tree.nbytes(matrices["embed/word/embedding"]) <= gathered
    rest = [one for one in found if one.kind != "all-gather"]
    # The words, looked up by parts, go once to the devices of their rows; gradients are summed once.
    looked_up = 4 * LENGTH * CONFIG["hidden_size"]
    assert sum(one.runs * one.nbytes for one in rest if one.kind == "all-to-all") <= looked_up
    sums = sum(one.runs * one.nbytes for one in rest if one.kind != "all-to-all")
    assert sums <= trained + 64


def test_without_a_mesh_in_the_model_activations_are_summed(monkeypatch):
    """What the constraints are for: so that the test above can fail."""
    monkeypatch.setattr("peftjax.backbone.on_mesh._on_mesh", lambda x, mesh, axes: x)
    found, state = of_step(pj.lora(rank=RANK), "fsdp=8")
    sums = sum(one.runs * one.nbytes for one in found if one.kind in ("all-reduce", "reduce-scatter"))
    assert sums > 2 * tree.nbytes(state.trainable)


GATHERS = {"snell": 4, "lst": 1, "dora on int4": 2.2}
"""How often the weights, or their codes, are gathered in a step. SNELL's thresholds are of merged weights;
no gradient enters the backbone of LST."""
SUMS = {"snell": 10, "dora on int4": 2}
"""Bytes summed for each byte that is trained; the norms of DoRA's columns are sums too."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "galore"])
def test_each_family_of_methods_has_a_budget(name):
    """GaLore aside, whose projectors are of the gradient of whole weights."""
    found, state = of_step(METHODS[name](), "fsdp=8")
    leaves = tree.named_leaves(state.frozen.params)
    base = {path: leaf for path, leaf in leaves.items() if getattr(leaf, "ndim", 0) > 1}
    held = tree.nbytes(base) + tree.nbytes(state.trainable)
    looked_up = 4 * LENGTH * CONFIG["hidden_size"]
    total = {kind: sum(one.runs * one.nbytes for one in found if one.kind == kind) for kind in KINDS}
    assert total["all-gather"] <= GATHERS.get(name, 2) * held + 4 * ROWS * LENGTH
    assert total["all-to-all"] <= 2 * looked_up
    assert (
        total["all-reduce"] + total["reduce-scatter"] <= SUMS.get(name, 1) * tree.nbytes(state.trainable) + 64
    )
    assert total["collective-permute"] == 0


@pytest.mark.slow
def test_tensor_parallelism_sums_each_branch_and_low_rank_inputs_of_the_last_layers():
    """That query, key and value have one sum is seen in a TPU's program: that of CPUs puts three into one."""
    found, state = of_step(pj.lora(rank=RANK), "tensor=4,data=2")
    tokens, layers = (ROWS // 2) * LENGTH, CONFIG["num_hidden_layers"]
    stream = tokens * CONFIG["hidden_size"]
    large = [one for one in found if one.nbytes >= 2 * stream]
    # Two branches a layer, forward and backward; the words; nothing else has the size of the stream.
    assert sum(one.runs for one in large if one.kind == "all-reduce") <= 4 * layers + 2
    assert all(one.kind == "all-reduce" for one in large)
    sums = [one for one in found if one.kind == "all-reduce"]
    thin = sum(one.runs for one in sums for shape in one.shapes if math.prod(shape) == tokens * RANK)
    assert thin <= 4 * layers  # of the last layer of each branch, and what backward computes again
    small = [(math.prod(shape), one.runs) for one in sums for shape in one.shapes]
    rest = sum(4 * size * runs for size, runs in small if size < stream // 2 and size != tokens * RANK)
    assert rest <= 3 * tree.nbytes(state.trainable)


@pytest.mark.slow
def test_over_sequence_attention_moves_heads_and_gathers_no_tokens():
    found, state = of_step(pj.lora(rank=RANK), "sequence=4,fsdp=2", length=512, rows=2)
    stream = 4 * 512 * CONFIG["hidden_size"]  # of the one row that a device has a part of
    gathers = [one for one in found if one.kind == "all-gather"]
    weights = tree.nbytes(state.frozen.params)
    assert sum(one.runs * one.nbytes for one in gathers) <= 2 * weights + stream // 4
    # Of queries, keys, values and results, forward and backward; a device has a fourth of the stream.
    moved = sum(one.runs * one.nbytes for one in found if one.kind == "all-to-all")
    assert 0 < moved <= 10 * CONFIG["num_hidden_layers"] * stream // 4


def test_shapes_and_types_of_the_text():
    text = """HloModule m

ENTRY %main (p: bf16[4,8]) -> bf16[32,8] {
  %a = bf16[32,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %b = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%p), channel_id=2, dimensions={0}
  %c = f32[4]{0} reduce-scatter(%q), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %d = bf16[32,8]{1,0} all-gather-done(%b)
}
"""
    kinds = {one.nbytes: one.kind for one in collectives(text)}
    assert kinds == {2 * 32 * 8: "all-gather", 4 * 4 * 4: "reduce-scatter"}
    assert math.isclose(np.sum([one.runs for one in collectives(text)]), 3)
