"""What every method, weight and optimizer here must do, as checks for anybody's own.

    pj.testing.check_method(my_method(rank=2))
    pj.testing.check_weight(MyWeight(...))
    pj.testing.check_optimizer(my_optimizer(1e-3))

Each raises an `AssertionError` that says what is not as it must be. The suite of this project runs the same.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax.interpreter import adapt
from peftjax.train.step import Training, divided, training
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform

KEY = jax.random.key(7)
RATE = 1e-3


# Methods.


@dataclass(frozen=True)
class Model:
    """What a method is checked on.

    Attributes:
        forward: `(params, batch) -> outputs`, or a backbone.
        params: its parameters, none of them zeros or ones, so that every comparison can fail.
        batch: inputs.
    """

    forward: Callable[..., Any]
    params: Params
    batch: Any


@dataclass(frozen=True)
class Case:
    """A method on a model, as it starts and as trained, and what one step of `pj.training` says of both."""

    method: Transform
    model: Model
    frozen: Frozen
    fresh: Trainable
    trained: Trainable
    step: Callable[..., dict[str, Any]]
    at_fresh: dict[str, Any]
    at_trained: dict[str, Any]


def small_model() -> Model:
    """A lookup, two linear layers, a norm's scale and a tied output, of width 8."""
    keys = iter(jax.random.split(KEY, 6))

    def drawn(*shape: int) -> jax.Array:
        return 0.3 * jax.random.normal(next(keys), shape)

    params = {
        "words": {"embedding": drawn(11, 8)},
        "up": {"kernel": drawn(8, 12), "bias": drawn(12)},
        "down": {"kernel": drawn(12, 8)},
        "norm": {"scale": 1.0 + drawn(8)},
    }

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        words = params["words"]["embedding"]
        hidden = jnp.tanh(jnp.take(words, tokens, axis=0) @ params["up"]["kernel"] + params["up"]["bias"])
        hidden = params["norm"]["scale"] * jnp.tanh(hidden @ params["down"]["kernel"])
        return hidden @ words.T

    return Model(forward, params, jax.random.randint(KEY, (2, 5), 0, 11))


def moved(values: Any, seed: int = 0) -> Any:
    """A tree as after some steps of training: every number moved by its own random amount."""
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.1 * noise.standard_normal(leaf.shape), leaf.dtype), values
    )


class _Recorded(NamedTuple):
    """The state of an optimizer that remembers the gradients it was given."""

    gradients: Any


_RECORDING = optax.GradientTransformation(_Recorded, lambda g, state, params=None: (g, _Recorded(g)))


def step_of(method: Transform, forward: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """`(trainable, frozen, batch)` to all that one step of `pj.training` says: loss, out, grads, stepped."""
    run = adapt(method.model(forward))

    def loss(params: Params, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        out = run(params, batch).astype(jnp.float32)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return {"loss": jnp.sum(weight * jnp.sin(out)), "out": out}, jnp.ones(())

    made: Training = training(method, loss, optax.chain(_RECORDING, optax.sgd(RATE)))

    def step(trainable: Trainable, frozen: Frozen, batch: Any) -> dict[str, Any]:
        state = made.tx.init(method.begin(frozen, trainable)[1])
        moved_part, fixed = divided(frozen, made.moves)
        stepped, state, _, said = made.run_step(trainable, state, moved_part, fixed, batch, None)
        return {**said, "grads": optax.tree.get(state, "gradients"), "stepped": stepped}

    return step


def begun(method: Transform, params: Params) -> tuple[Frozen, Trainable]:
    """What `init` gives, as a loop has it that has advanced the method."""
    frozen, trainable = method.init(KEY, params)
    return dataclasses.replace(frozen, advanced=True), trainable


def case_of(method: Transform, model: Model, *, compiled: bool = True) -> Case:
    """The method on the model; without `compiled` operation by operation.

    Raises:
        PeftError: the method finds nothing to adapt in the model.
    """
    frozen, fresh = begun(method, model.params)
    step = step_of(method, model.forward)
    step = jax.jit(step) if compiled else step
    trained = moved(fresh)
    at = [step(trainable, frozen, model.batch) for trainable in (fresh, trained)]
    return Case(method, model, frozen, fresh, trained, step, *at)
