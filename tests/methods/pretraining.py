"""A small model for the methods of pre-training: runs of it, sharded and interrupted."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, normal

import peftjax as pj
from peftjax.train.loop import FitResult
from peftjax.train.step import Training, TrainingState

N, M = 16, 8
_KEYS = jax.random.split(KEY, 4)
PARAMS = {
    "up": {"kernel": normal(_KEYS[0], (N, M)) / N**0.5},
    "blocks": {"down": {"weight": normal(_KEYS[1], (2, N, M)) / M**0.5}},
    "norm": {"scale": jnp.ones(M)},
}
X, Y = normal(_KEYS[2], (24, N)), normal(_KEYS[3], (24, N))


def forward(params: Any, x: jax.Array) -> jax.Array:
    """A linear layer [in, out] and two stacked ones [stack, out, in]."""
    h = jnp.tanh(x @ params["up"]["kernel"]) * params["norm"]["scale"]
    first, second = params["blocks"]["down"]["weight"]
    return h @ first.T + h @ second.T


def loss_of(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean((pj.adapt(forward)(params, batch) - Y) ** 2)


def started(
    method: pj.Transform,
    tx: optax.GradientTransformation,
    params: Any = PARAMS,
    *,
    loss: Any = loss_of,
    place: Any = lambda slots: slots,
) -> tuple[Training, TrainingState]:
    """A training by `pj.training` before its first step.

    Args:
        method: of the training.
        tx: of the training.
        params: of the model.
        loss: `(params, batch) -> scalar`.
        place: done to the trainable and to the method's state.
    """
    run, (frozen, trainable) = pj.training(method, loss, tx), method.init(KEY, params)
    return run, run.begin(replace(frozen, state=place(frozen.state)), place(trainable), KEY)


def resting(run: Training) -> Training:
    """The same training without what the method does between steps, for a step of the optimizer alone."""
    return replace(run, method=replace(run.method, advances=()))


def advanced(
    run: Training, state: TrainingState, step: int, batch: jax.Array = X, **changes: Any
) -> TrainingState:
    """What the method does before the step with that number; the state given stays whole.

    Args:
        run: of the state.
        state: after any steps.
        step: which the method is told.
        batch: of that step.
        changes: of the state's fields, before.
    """
    given = replace(state, step=step, **changes)
    moved = {name: getattr(given, name) for name in ("frozen", "trainable", "opt_state")}
    given = replace(given, **jax.tree.map(jnp.copy, moved))
    return replace(run.advance(given, batch), step=state.step)


def slots_of(state: TrainingState, path: str) -> dict[str, jax.Array]:
    """All that a method has of a weight: what it trains, and what it holds."""
    return {**state.frozen.state[path], **state.trainable[path]}


def merged(run: Training, state: TrainingState) -> Any:
    """The dense model, which no later step writes over."""
    return jax.tree.map(jnp.copy, run.method.merge(state.frozen, state.trainable))


def sharded(slots: Any) -> Any:
    """A trainable, or a method's state, on eight devices: inputs over two, outputs over four."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sides = {"a": "fsdp", "pool_a": "fsdp", "b": "tensor", "pool_b": "tensor"}

    def place(path, leaf):
        spec = [None] * (leaf.ndim - 1) + [sides.get(path[-1].key)] if leaf.ndim else []
        if path[-1].key == "weight":
            spec[-2:] = ("tensor", "fsdp") if "down" in path[0].key else ("fsdp", "tensor")
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    return jax.tree_util.tree_map_with_path(place, slots)


def resumed(method: pj.Transform, directory: Any, steps: int = 10) -> tuple[FitResult, FitResult]:
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


def assert_same_end(continued: FitResult, whole: FitResult) -> None:
    """Bit by bit the same adapter, and the same state of the method."""
    jax.tree.map(np.testing.assert_array_equal, continued.trainable, whole.trainable)
    jax.tree.map(np.testing.assert_array_equal, continued.frozen, whole.frozen)
    assert continued.step == whole.step
