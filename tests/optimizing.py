"""What tests of optimizers share: a few steps of one program, through a checkpoint, on four devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close

from peftjax.io import checkpoint


def train(tx, params, grads, state=None):
    """Parameters and state after one donating step for each of the gradients, and all updates."""
    state, updates = tx.init(params) if state is None else state, []
    params, state = jax.tree.map(jnp.copy, (params, state))
    for gradient in grads:
        made, state, params = _step(tx)(gradient, state, params)
        updates.append(made)
    return params, state, updates


@functools.lru_cache(maxsize=8)
def _step(tx):
    def step(grads, state, params):
        made, state = tx.update(grads, state, params)
        return made, state, optax.apply_updates(params, made)

    return jax.jit(step, donate_argnums=(1, 2))


def assert_resumes(tx, params, grads, folder):
    """A run that goes on from a checkpoint in its middle equals the one without, bit by bit."""
    wanted = train(tx, params, grads)
    half = len(grads) // 2
    trained, state, _ = train(tx, params, grads[:half])
    with checkpoint.open_checkpoints(folder, keep_last=1, keep_best=1) as checkpoints:
        checkpoint.save(checkpoints, checkpoint.RunState(trained, state, KEY, half, {}, {}))
    with checkpoint.open_checkpoints(folder, keep_last=1, keep_best=1) as checkpoints:
        blank = checkpoint.RunState(params, tx.init(params), KEY, 0, {}, {})
        found = checkpoint.restore_latest(checkpoints, blank)
    again = train(tx, found.trainable, grads[half:], found.opt_state)
    jax.tree.map(np.testing.assert_array_equal, again[:2], wanted[:2])


def assert_same_when_sharded(tx, params, grads, tolerance=1e-5, kind=AxisType.Auto):
    """Matrices split over inputs and outputs on 2 x 2 devices end where those of one device do."""
    axes = {"axis_types": (kind,) * 2, "devices": jax.devices()[:4]}
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), **axes)

    def spread(tree):
        def put(leaf):
            split = leaf.ndim >= 2 and leaf.shape[-1] % 2 == leaf.shape[-2] % 2 == 0
            spec = P(*[None] * (leaf.ndim - 2), "data", "tensor") if split else P()
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(put, tree)

    began = spread(params)
    with jax.set_mesh(mesh):
        sharded = train(tx, began, [spread(gradient) for gradient in grads])[0]
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(began))
    for leaf, first in zip(jax.tree.leaves(sharded), jax.tree.leaves(began)):
        assert leaf.sharding.is_equivalent_to(first.sharding, leaf.ndim)
    assert_close(sharded, train(tx, params, grads)[0], tolerance)
