"""What every optimizer of `peftjax.optim` must do, on a stacked tree named as the library's backbones."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_close

from peftjax.io import checkpoint

_SHAPES = {
    "blocks": {
        "query": {"kernel": (2, 8, 16), "bias": (2, 16)},
        "down": {"kernel": (2, 16, 8)},
        "norm": {"scale": (2, 8), "bias": (2, 8)},
    },
    "head": {"kernel": (8, 4)},
}
_SPECS = {"query": P(None, "data", "tensor"), "down": P(None, "tensor", "data"), "head": P("data", "tensor")}


def random_like(tree: Any, seed: int, scale: float = 1.0) -> Any:
    """A tree of the same shapes (arrays or tuples) and dtypes, with normal random numbers."""
    random = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        shape = leaf if isinstance(leaf, tuple) else leaf.shape
        return jnp.asarray(scale * random.standard_normal(shape), getattr(leaf, "dtype", jnp.float32))

    return jax.tree.map(draw, tree, is_leaf=lambda node: isinstance(node, tuple))


PARAMS = random_like(_SHAPES, 0)


@functools.lru_cache(maxsize=8)
def _step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def train(tx: optax.GradientTransformation, params: Any, steps: range, state: Any = None) -> tuple[Any, Any]:
    """Parameters and state after the steps, in a jitted and donating loop; step t has gradients of seed t."""
    run = _step(tx)
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params) if state is None else jax.tree.map(jnp.copy, state)
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    for t in steps:
        params, state = run(params, state, jax.device_put(random_like(params, 100 + t), places))
    return params, state


def assert_moves_as(tx: optax.GradientTransformation, other: optax.GradientTransformation, **options: Any):
    """Two optimizers make the same parameters in three steps."""
    assert_close(train(tx, PARAMS, range(3))[0], train(other, PARAMS, range(3))[0], **options)


def assert_sharded_equals_one_device(
    tx: optax.GradientTransformation, kind: AxisType = AxisType.Auto
) -> None:
    """Three steps of parameters spread over ('data', 'tensor') make those of one device, and stay spread."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        spec = _SPECS.get(path[-2].key, P()) if path[-1].key == "kernel" else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    spread = jax.tree_util.tree_map_with_path(place, PARAMS)
    with jax.set_mesh(mesh):
        got, _ = train(tx, spread, range(3))
    assert_close(got, train(tx, PARAMS, range(3))[0], 1e-6)
    kernel = got["blocks"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 4)


def assert_resumes(tx: optax.GradientTransformation, folder: Any) -> None:
    """A run that goes on from a checkpoint has the bits of one that was not stopped."""
    params, state = train(tx, PARAMS, range(2))
    saved = checkpoint.RunState(params, state, jax.random.key(0), 2, {}, {})
    with checkpoint.open_checkpoints(folder, keep_last=1, keep_best=0) as checkpoints:
        checkpoint.save(checkpoints, saved)
    fresh = checkpoint.RunState(PARAMS, tx.init(PARAMS), jax.random.key(1), 0, {}, {})
    with checkpoint.open_checkpoints(folder, keep_last=1, keep_best=0) as checkpoints:
        found = checkpoint.restore_latest(checkpoints, fresh)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state)
    resumed = train(tx, found.trainable, range(2, 4), found.opt_state)
    jax.tree.map(np.testing.assert_array_equal, resumed, train(tx, PARAMS, range(4)))


def assert_works_inside_optax(tx: optax.GradientTransformation) -> None:
    """In a chain, for a part of the tree, and with accumulated gradients it makes the step it makes alone."""
    want, _ = train(tx, PARAMS, range(1))
    chained = optax.chain(optax.clip_by_global_norm(1e9), tx)
    assert_close(train(chained, PARAMS, range(1))[0], want, 1e-6)
    labels = {"blocks": "own", "head": "other"}
    parts = optax.partition({"own": tx, "other": optax.set_to_zero()}, labels)
    got, _ = train(parts, PARAMS, range(1))
    assert_close(got, {**want, "head": PARAMS["head"]}, 1e-6)
    _assert_accumulates(tx, want)


def _assert_accumulates(tx: optax.GradientTransformation, want: Any) -> None:
    several = optax.MultiSteps(tx, every_k_schedule=2)
    grads, state = random_like(PARAMS, 100), several.init(PARAMS)
    update = jax.jit(several.update)
    updates, state = update(grads, state, PARAMS)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    updates, state = update(grads, state, PARAMS)
    assert_close(optax.apply_updates(PARAMS, updates), want, 1e-6)


def assert_keeps_dtypes(tx: optax.GradientTransformation) -> None:
    """Half precision stays, in the parameters and from state to state, and the step is float32's, rounded."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    got, state = train(tx, half, range(1))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(got))
    dtypes = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
    assert dtypes(state) == dtypes(tx.init(half))
    full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), random_like(half, 100))
    updates, _ = jax.jit(tx.update)(grads, tx.init(full), full)
    assert_close(got, optax.apply_updates(full, updates), 2**-8)
