"""One text says what a mesh is, and what cannot be is said in one sentence."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType
from meshes import MODEL

import peftjax as pj
from peftjax.parallel import make_mesh, read_mesh
from peftjax.parallel.mesh import require_rows


def test_sizes_of_a_text():
    assert read_mesh("fsdp=8, tensor=4") == {"fsdp": 8, "tensor": 4}


def test_all_devices_are_on_fsdp_by_default():
    mesh = make_mesh()
    assert dict(mesh.shape) == {
        "data": 1, "fsdp": len(jax.devices()), "expert": 1, "tensor": 1, "sequence": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsd=8", "no axis is called 'fsd'; closest: 'fsdp'"),
        ("fsdp=2,fsdp=4", "has 'fsdp' twice"),
        ("fsdp=0", "size of 'fsdp' must be a positive whole number, not '0'"),
        ("fsdp", "size of 'fsdp' must be a positive whole number, not ''"),
        ("fsdp=2,tensor=3", "of 6 devices and there are 8"),
    ],
)
def test_what_is_no_mesh(text, message):
    with pytest.raises(pj.PeftError, match=message):
        make_mesh(text, jax.devices()[:8])


def test_a_batch_that_is_not_divided():
    require_rows("batch_size", 16, make_mesh())
    with pytest.raises(pj.PeftError, match="batch_size: 12 rows at a time are not divided by the 8 devices"):
        require_rows("batch_size", 12, make_mesh())
    require_rows("batch_size", 16, make_mesh("fsdp=2,expert=4"))
    with pytest.raises(pj.PeftError, match="not divided by the 8 devices of data, fsdp and expert"):
        require_rows("batch_size", 2, make_mesh("fsdp=2,expert=4"))


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (("data", "model"), AxisType.Auto, "no axis 'fsdp'"),
        (("data", "fsdp", "expert", "tensor", "sequence"), AxisType.Explicit, "Explicit axes"),
    ],
)
def test_a_backbone_refuses_a_mesh_of_other_axes(names, kind, message):
    mesh = jax.make_mesh((8, *(1,) * (len(names) - 1)), names, axis_types=(kind,) * len(names))
    with pytest.raises(pj.PeftError, match=message):
        dataclasses.replace(MODEL, mesh=mesh)


def test_a_row_is_divided_over_no_more_devices_than_heads_allow():
    mesh = make_mesh("tensor=2,sequence=4")
    dataclasses.replace(MODEL, mesh=mesh)
    config = dataclasses.replace(MODEL.block.config, num_heads=4, num_kv_heads=4)
    few = dataclasses.replace(MODEL, block=MODEL.block.clone(config=config))
    message = "tensor=2 and sequence=4, and attention divides 4 heads .* product divides 4"
    with pytest.raises(pj.PeftError, match=message):
        dataclasses.replace(few, mesh=mesh)
    dataclasses.replace(few, mesh=make_mesh("fsdp=2,sequence=4"))
