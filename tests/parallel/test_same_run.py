"""A run gives the same losses on every mesh, and on devices in any order."""

import functools

import jax
import numpy as np
import pytest
from meshes import MESHES, losses

import peftjax as pj

METHODS = {
    "full": pj.full,
    "lora": lambda: pj.lora(rank=4),
    "dora on int4": lambda: pj.chain(pj.quantized(format="int4", group=32), pj.dora(rank=4)),
    "nf4": lambda: pj.chain(pj.nf4(), pj.lora(rank=4)),
    "galore": lambda: pj.galore(rank=4, every=5),
    "paca": lambda: pj.paca(rank=4),
    "snell": lambda: pj.snell(rank=4),
    "meft": lambda: pj.meft(variant=1),
    "houlsby": lambda: pj.houlsby(size=8),
    "prefix": lambda: pj.prefix(length=4),
    "lst": lambda: pj.lst(reduction=4),
    "coded residuals": lambda: pj.chain(pj.coded_residuals(), pj.lora(rank=4)),
}
BOUNDS = {"snell": 1e-4, "galore": 1e-4, "full": 2e-5, "meft": 2e-5, "coded residuals": 2e-3}
"""Of what decides by sizes, inverts a block, or rounds what backward keeps to few bits."""


@functools.cache
def losses_of_one_device(name, **options):
    """What every mesh must give."""
    return losses(METHODS[name](), **options)[0]


def test_a_lora_on_all_kinds_of_axes():
    wanted, _ = losses(METHODS["lora"](), steps=5)
    found, state = losses(METHODS["lora"](), "data=2,fsdp=2,tensor=2", steps=5)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    slots = state.trainable["blocks/feed_forward/up/kernel"]
    assert slots["a"].sharding.spec[-1] == "fsdp"
    assert slots["b"].sharding.spec[-1] == ("tensor", "fsdp")
    moments = state.opt_state[0].mu["blocks/feed_forward/down/kernel"]
    assert moments["a"].sharding.spec[-1] == ("tensor", "fsdp")
    assert moments["b"].sharding.spec[-1] == "fsdp"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_one_device(name):
    method, wanted = METHODS[name](), losses_of_one_device(name)
    assert wanted[-1] < wanted[0]
    for sizes in MESHES if name in ("lora", "full") else MESHES[1::2]:
        found, _ = losses(method, sizes)
        np.testing.assert_allclose(found, wanted, rtol=BOUNDS.get(name, 1e-5), err_msg=sizes)


@pytest.mark.slow
def test_fewer_devices_and_another_order():
    method, wanted = METHODS["lora"](), losses_of_one_device("lora")
    devices = jax.devices()
    for sizes, some in (
        ("fsdp=2", devices[:2]),
        ("fsdp=2,tensor=2", devices[4:8]),
        ("fsdp=4,tensor=2", devices[::-1]),
    ):
        found, _ = losses(method, sizes, some)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=sizes)


@pytest.mark.slow
def test_one_row_whose_tokens_lie_over_axes_that_rows_leave():
    """With 4 heads of keys and values for 8 devices, and the row's tokens over `fsdp` too."""
    wanted, _ = losses(METHODS["lora"](), steps=3, rows=1)
    found, _ = losses(METHODS["lora"](), "fsdp=2,sequence=4", steps=3, rows=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        *((sizes, "lora") for sizes in ("sequence=2", "sequence=8", "tensor=2,sequence=4")),
        *(("tensor=2,sequence=4", name) for name in ("prefix", "meft")),
        *(("sequence=4", name) for name in ("prefix", "meft")),
    ],
)
@pytest.mark.parametrize("attention", ["rows", "flash"])
def test_tokens_over_sequence(attention, sizes, name):
    method, options = METHODS[name](), {"rows": 2, "length": 64, "attention": attention}
    wanted = losses_of_one_device(name, steps=5, rows=2, length=64)
    devices = jax.devices()[: 2 if sizes == "sequence=2" else 4 if sizes == "sequence=4" else 8]
    found, _ = losses(method, sizes, devices, steps=5, **options)
    np.testing.assert_allclose(found, wanted, rtol=BOUNDS.get(name, 1e-5))


@pytest.mark.slow
def test_tiles_and_parts_of_the_loss_have_tokens_of_every_device(monkeypatch):
    monkeypatch.setattr("peftjax.losses.CHUNK", 10)
    method, options = METHODS["lora"](), {"rows": 2, "length": 56, "steps": 5}
    wanted, _ = losses(method, **options)
    found, _ = losses(method, "sequence=4,tensor=2", feed_forward_tile=5, **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
