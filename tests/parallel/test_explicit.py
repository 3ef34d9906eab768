"""Training on a mesh with Explicit axes: the loss of a backbone runs in `jax.sharding.auto_axes`."""

import contextlib
import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from meshes import CONFIG, MODEL

import peftjax as pj
from peftjax.parallel import make_mesh, shard_batch, shard_state


def losses(method, mesh=None):
    """Those of four steps; with a mesh on the same devices with Explicit axes."""
    ids = jax.random.randint(jax.random.key(3), (8, 16), 0, CONFIG["vocab_size"])
    batch = {"input_ids": ids, "labels": ids}
    forward = method.model(dataclasses.replace(MODEL, mesh=mesh))

    def loss(params, batch):
        return pj.losses.cross_entropy(forward(params, batch), batch)

    if mesh is not None:
        loss = jax.sharding.auto_axes(loss, axes=mesh.axis_names, out_sharding=PartitionSpec())
    run = pj.training(method, pj.adapt(loss), optax.adamw(1e-2))
    state, found = run.start(jax.random.key(1), MODEL.init(jax.random.key(0))), []
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            kinds = (AxisType.Explicit,) * len(mesh.axis_names)
            explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
            stack.enter_context(jax.set_mesh(explicit))
            state, batch = shard_state(state, explicit), shard_batch(batch, explicit)
        for _ in range(4):
            state, metrics = run.step(state, batch)
            found.append(float(metrics["loss"]))
    if mesh is not None:
        leaf = jax.tree.leaves((state.trainable, state.frozen.params))[0]
        assert AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "nf4", "dora", "full"])
def test_losses_are_those_of_one_device(name):
    methods = {
        "lora": pj.lora(rank=4),
        "nf4": pj.chain(pj.nf4(), pj.lora(rank=4)),
        "dora": pj.dora(rank=4),
        "full": pj.full(),
    }
    found, wanted = losses(methods[name], make_mesh("fsdp=4,tensor=2")), losses(methods[name])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
