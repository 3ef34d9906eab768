"""A plan on a mesh has the sizes of one device, and what passes between all."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import MODEL

import peftjax as pj
from peftjax.core import tree
from peftjax.planner import machine
from peftjax.planner.specification import find_specification


def planned(method, **options):
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    batch = {"input_ids": ids, "labels": ids}
    return pj.plan(method, MODEL, MODEL.shapes, batch, optimizer=optax.adamw(1e-3), **options)


def test_sizes_are_those_of_one_device():
    found = planned(pj.lora(rank=4), mesh="fsdp=8")
    whole = tree.nbytes(MODEL.shapes)
    vectors = sum(leaf.size * 4 for leaf in jax.tree.leaves(MODEL.shapes) if min(leaf.shape) <= 2)
    assert whole / 8 <= found.bytes.weights <= whole / 8 + vectors
    assert found.devices == 8
    assert found.collectives["all-gather"].nbytes > whole
    assert "8 x cpu, each" in str(found)
    assert "all-gather" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "module", "mesh"),
    [("h200:2", "jax_plugins.xla_cuda13", "fsdp=2"), ("v5e:2x2", "libtpu", "fsdp=2,tensor=2")],
)
def test_devices_that_are_not_there_have_bounds_and_collectives(target, module, mesh):
    if not machine._is_installed(module):
        pytest.skip(f"{module} is not installed")
    found, alone = (planned(pj.lora(rank=4), target=target, mesh=over) for over in (mesh, None))
    assert found.devices == int(np.prod([int(size) for size in re.findall(r"\d", mesh)]))
    assert found.fits
    assert found.collectives["all-gather"].nbytes > 0
    gathered = found.collectives["all-gather"]
    assert 0.5 * gathered.nbytes <= gathered.crossing < gathered.nbytes
    assert found.roofline.network > 0 == alone.roofline.network
    # Over `tensor` each device makes the thin products of the adapter's inputs by itself.
    assert found.roofline.compute == pytest.approx(alone.roofline.compute / found.devices, rel=0.1)
    assert found.capacity == alone.capacity == find_specification(target).memory


@pytest.mark.slow
def test_what_is_done_between_steps_is_compiled_for_the_mesh():
    assert planned(pj.galore(rank=4), mesh="fsdp=8").between


def test_a_mesh_of_other_devices_than_the_targets():
    with pytest.raises(pj.PeftError, match="of 16 devices and there are 8"):
        pj.plan(pj.lora(), MODEL, MODEL.shapes, {}, optimizer=optax.sgd(1.0), mesh="fsdp=16")
