"""A small model for the methods of pre-training: runs of it, sharded and interrupted."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY

import peftjax as pj

N, M = 16, 8
_KEYS = jax.random.split(KEY, 4)
PARAMS = {
    "up": {"kernel": jax.random.normal(_KEYS[0], (N, M)) / N**0.5},
    "blocks": {"down": {"weight": jax.random.normal(_KEYS[1], (2, N, M)) / M**0.5}},
    "norm": {"scale": jnp.ones(M)},
}
X, Y = jax.random.normal(_KEYS[2], (24, N)), jax.random.normal(_KEYS[3], (24, N))


def forward(params: Any, x: jax.Array) -> jax.Array:
    """A linear layer [in, out] and two stacked ones [stack, out, in]."""
    h = jnp.tanh(x @ params["up"]["kernel"]) * params["norm"]["scale"]
    first, second = params["blocks"]["down"]["weight"]
    return h @ first.T + h @ second.T


def loss_of(method: pj.Transform, frozen: Any, trainable: Any) -> jax.Array:
    return jnp.mean((pj.adapt(forward)(method.apply(frozen, trainable), X) - Y) ** 2)


def trainer(method: pj.Transform, frozen: Any, tx: optax.GradientTransformation) -> Any:
    """`(trainable, state) -> (trainable, state, gradients)`."""

    @jax.jit
    def step(trainable, state):
        grads = jax.grad(lambda t: loss_of(method, frozen, t))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, grads

    return step


def renewer(method: pj.Transform, frozen: Any, prefix: tuple[str, ...] = ()) -> Any:
    """`(trainable, state, step) -> (trainable, state)`, the method's only renewal."""
    (renewal,) = method.renewals

    @jax.jit
    def renew(trainable, state, step, key=KEY):
        key = jax.random.fold_in(key, step)
        return renewal.run(None, frozen, trainable, state, step=step, key=key, prefix=prefix)

    return lambda trainable, state, step, **options: renew(trainable, state, jnp.asarray(step), **options)


def sharded(trainable: Any) -> Any:
    """On eight devices: inputs over two, outputs over four."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sides = {"a": "fsdp", "pool_a": "fsdp", "b": "tensor", "pool_b": "tensor"}

    def place(path, leaf):
        spec = [None] * (leaf.ndim - 1) + [sides.get(path[-1].key)] if leaf.ndim else []
        if path[-1].key == "weight":
            spec[-2:] = ("tensor", "fsdp") if "down" in path[0].key else ("fsdp", "tensor")
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    return jax.tree_util.tree_map_with_path(place, trainable)


def resumed(method: pj.Transform, directory: Any, steps: int = 10) -> tuple[Any, Any]:
    """A run of `fit` interrupted in the middle and continued, and the same in one piece."""
    params = {**tiny.base(), "head": {"kernel": jnp.ones((16, 3)), "bias": jnp.zeros(3)}}
    params["layer"] = {"kernel": jax.random.normal(KEY, (16, 16)) / 4}

    def model(params, batch, *, key=None):
        embed = params["embed"] @ params["layer"]["kernel"]
        return tiny.forward({**params, "embed": embed}, batch, key=key)

    frozen, trainable = method.init(jax.random.key(0), params)
    options = {"frozen": frozen, "trainable": trainable, "method": method, "forward": model}
    config = replace(tiny.CONFIG, schedule="constant", warmup_ratio=0.0, steps=steps, keep_best=0)
    tiny.run(directory, replace(config, steps=steps // 2), **options)
    return tiny.run(directory, config, **options), tiny.run(config=config, **options)
