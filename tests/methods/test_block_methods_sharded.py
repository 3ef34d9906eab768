"""Methods of blocks on eight devices, the batch and the parameters divided: the gradients of one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, all_but_slow, assert_close, example_of
from tiny_models import BACKBONES, CLASSIFIERS, moved, tiny

import peftjax as pj

OF_BLOCKS = [name for name, info in pj.METHODS.items() if info.of_blocks]


def halves(leaf):
    """The last axis of a parameter over two devices, where it can be."""
    divides = leaf.ndim > 1 and leaf.shape[-1] % 2 == 0
    return P(*(None,) * (leaf.ndim - 1), "tensor") if divides else P()


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(OF_BLOCKS, ("pfeiffer", "meft")))
def test_gradients_on_eight_devices_are_those_on_one(name):
    info = pj.METHODS[name]
    method = example_of(name)
    model = tiny((CLASSIFIERS if info.conformance.reads_classifier else BACKBONES)[0])
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 4)[:8], model.batch)
    frozen, trainable = method.init(KEY, model.params)
    trainable = moved(trainable, 3)
    run = pj.adapt(method.model(model.forward))

    @jax.jit
    def gradients(trainable, frozen, batch):
        def loss(trainable):
            out = run(method.apply(frozen, trainable), batch)
            weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(weight * jnp.sin(out.astype(jnp.float32)))

        return jax.value_and_grad(loss, allow_int=True)(trainable)

    wanted = gradients(trainable, frozen, batch)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, halves(leaf))), frozen)
    rows = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P("data"))), batch)
    assert_close(jax.device_get(gradients(trainable, spread, rows)), jax.device_get(wanted), 1e-4)
