"""What an optimizer may be used for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax.testing.comparisons import assert_close, same
from peftjax.testing.model import moved


def check_optimizer(tx: optax.GradientTransformation, params: Any | None = None) -> None:
    """Check that an optimizer can be used wherever one of optax can.

    Its state has the same structure, shapes and dtypes after each step, its updates those of the parameters;
    the loss of a parabola falls; it makes the same step in a chain, for a part of the parameters and with
    gradients that are accumulated over steps; and a state that was stored as arrays goes on bit by bit.

    Args:
        tx: the optimizer, with a learning rate that is small enough for numbers of size one.
        params: by default a stack of matrices with biases and norms, as the library's backbones have.

    Raises:
        AssertionError: it cannot; the message says what failed.
    """
    params = _parameters() if params is None else params
    grads = [moved(jax.tree.map(jnp.zeros_like, params), seed) for seed in range(1, 4)]
    state, step = tx.init(params), _optimizer_step(tx)
    shapes = _shapes_of(state)
    current = params
    for number, gradient in enumerate(grads):
        updates, state, current = step(gradient, state, current)
        assert _shapes_of(updates) == _shapes_of(params), "updates are not shaped as the parameters"
        assert _shapes_of(state) == shapes, f"the state is another after step {number + 1}"
    stored = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), (state, current))
    again, wanted = step(grads[0], *stored)[2], step(grads[0], state, current)[2]
    assert same(again, wanted), "a stored state does not go on as the one in memory"
    _falls(tx, params)
    first = step(grads[0], tx.init(params), params)[2]
    chained = optax.chain(optax.clip_by_global_norm(1e9), tx)
    in_chain = _optimizer_step(chained)(grads[0], chained.init(params), params)[2]
    assert_close(in_chain, first, 1e-6, what="in a chain")
    _works_for_a_part(tx, params, grads[0], first)
    _works_with_gathered_gradients(tx, params, grads[0], first)


def _optimizer_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any, Any]]:
    @jax.jit
    def step(gradient: Any, state: Any, params: Any) -> tuple[Any, Any, Any]:
        updates, state = tx.update(gradient, state, params)
        return updates, state, optax.apply_updates(params, updates)

    return step


def _falls(tx: optax.GradientTransformation, params: Any) -> None:
    """The loss of a parabola, in twenty steps."""
    goal, step = moved(params, 9), _optimizer_step(tx)

    def loss(params: Any) -> jax.Array:
        gaps = jax.tree.map(lambda p, q: jnp.sum(jnp.square(p - q)), params, goal)
        return sum(jax.tree.leaves(gaps), jnp.zeros(()))

    state, current = tx.init(params), params
    for _ in range(20):
        _, state, current = step(jax.grad(loss)(current), state, current)
    assert float(loss(current)) < float(loss(params)), "twenty steps do not lower the loss of a parabola"


def _works_for_a_part(tx: optax.GradientTransformation, params: Any, gradient: Any, first: Any) -> None:
    """In `optax.partition` each part at the top of the tree but the last moves as with the others."""
    *some, last = params
    labels = {**dict.fromkeys(some, "own"), last: "other"}
    parts = optax.partition({"own": tx, "other": optax.set_to_zero()}, labels)
    got = _optimizer_step(parts)(gradient, parts.init(params), params)[2]
    assert_close(got, {**first, last: params[last]}, 1e-6, what="for a part of the parameters")


def _works_with_gathered_gradients(
    tx: optax.GradientTransformation, params: Any, gradient: Any, first: Any
) -> None:
    several = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    step, state = _optimizer_step(several), several.init(params)
    _, state, current = step(gradient, state, params)
    assert same(current, params), "a gradient that is gathered moves the parameters"
    assert_close(step(gradient, state, current)[2], first, 1e-6, what="with gathered gradients")


def _parameters() -> Any:
    shapes = {
        "blocks": {
            "query": {"kernel": (2, 8, 16), "bias": (2, 16)},
            "down": {"kernel": (2, 16, 8)},
            "norm": {"scale": (2, 8)},
        },
        "head": {"kernel": (8, 4)},
    }
    zeros = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda node: isinstance(node, tuple))
    return jax.tree.map(lambda leaf: 10.0 * leaf, moved(zeros))


def _shapes_of(values: Any) -> Any:
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), values)
