"""What every optimizer of `peftjax.optim` must do, on a stacked tree named as the library's backbones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizing
from jax.sharding import AxisType
from support import assert_close

_SHAPES = {
    "blocks": {
        "query": {"kernel": (2, 8, 16), "bias": (2, 16)},
        "down": {"kernel": (2, 16, 8)},
        "norm": {"scale": (2, 8), "bias": (2, 8)},
    },
    "head": {"kernel": (8, 4)},
}


def random_like(tree: Any, seed: int, scale: float = 1.0) -> Any:
    """A tree of the same shapes (arrays or tuples) and dtypes, with normal random numbers."""
    random = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        shape = leaf if isinstance(leaf, tuple) else leaf.shape
        return jnp.asarray(scale * random.standard_normal(shape), getattr(leaf, "dtype", jnp.float32))

    return jax.tree.map(draw, tree, is_leaf=lambda node: isinstance(node, tuple))


PARAMS = random_like(_SHAPES, 0)


GRADS = [random_like(PARAMS, 100 + t) for t in range(4)]


def train(tx: optax.GradientTransformation, params: Any, steps: range, state: Any = None) -> tuple[Any, Any]:
    """Parameters and state after the steps; step t has gradients of seed 100 + t."""
    return optimizing.train(tx, params, [random_like(params, 100 + t) for t in steps], state)[:2]


def assert_moves_as(tx: optax.GradientTransformation, other: optax.GradientTransformation, **options: Any):
    """Two optimizers make the same parameters in three steps."""
    assert_close(train(tx, PARAMS, range(3))[0], train(other, PARAMS, range(3))[0], **options)


def assert_sharded_equals_one_device(
    tx: optax.GradientTransformation, kind: AxisType = AxisType.Auto
) -> None:
    """Three steps of parameters spread over ('data', 'tensor') make those of one device, and stay spread."""
    optimizing.assert_same_when_sharded(tx, PARAMS, GRADS[:3], 1e-6, kind)


def assert_resumes(tx: optax.GradientTransformation, folder: Any) -> None:
    """A run that goes on from a checkpoint has the bits of one that was not stopped."""
    optimizing.assert_resumes(tx, PARAMS, GRADS, folder)


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
