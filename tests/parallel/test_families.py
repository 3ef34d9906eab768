"""Every kind of backbone gives on a mesh the outputs and gradients of one device."""

import dataclasses

import beside
import jax
import jax.numpy as jnp
import pytest
import tiny_t5
from support import assert_close
from tiny_models import BACKBONES, CLASSIFIERS, tiny

from peftjax.parallel import make_mesh, shard, shard_batch


def of_name(name):
    """A backbone, its parameters and a batch of two rows."""
    if name == "images":
        return beside.images()
    if name == "encoder-decoder":
        return *tiny_t5.make(), tiny_t5.token_batch()
    model = tiny(name)
    return model.forward, model.params, model.batch


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys((*BACKBONES, *CLASSIFIERS, "images", "encoder-decoder")))
def test_gradients_on_a_mesh(name):
    model, params, batch = of_name(name)
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 4)[:8], batch)

    def gradients(forward, params, batch):
        def loss(params):
            out = jnp.asarray(forward(params, batch)).astype(jnp.float32)
            return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

        return jax.jit(jax.value_and_grad(loss))(params)

    wanted = gradients(model, params, batch)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    on_mesh = dataclasses.replace(model, mesh=mesh)
    found = gradients(on_mesh, shard(params, mesh), shard_batch(batch, mesh))
    assert_close(jax.device_get(found), jax.device_get(wanted), 1e-4)
