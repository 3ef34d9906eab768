"""The projection with other transformations inside and around it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizing
import pytest
from support import KEY, assert_close

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.optim.projection import project


def tree_of(step):
    up, bias, down, head = jax.random.split(jax.random.fold_in(KEY, step), 4)
    return {
        "up": {"kernel": jax.random.normal(up, (2, 6, 10)), "bias": jax.random.normal(bias, (2, 10))},
        "down": {"kernel": jax.random.normal(down, (10, 6))},
        "head": {"kernel": jax.random.normal(head, (6, 4))},
    }


PARAMS, GRADS = tree_of(99), [tree_of(step) for step in range(8)]
PROJECTED = ["up/kernel", "down/kernel"]


def train(tx, steps=5, grads=GRADS):
    return optimizing.train(tx, PARAMS, grads[:steps])


INNERS = {
    "adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "lion": optax.scale_by_lion(),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(0.1),
    "labels": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)},
        lambda params: tree.map_named(lambda path, _: "a" if path in PROJECTED else "b", params),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_any_inner_transformation(inner, moments):
    params, *_ = train(project(inner, rank=2, every=2, moments=moments))
    moved = tree.named_leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, PARAMS))
    assert all(0 < distance < 100 for distance in moved.values())


def test_an_inner_transformation_that_asks_for_parameters_is_refused():
    tx = project(optax.adamw(0.1), rank=2)
    with pytest.raises(PeftError, match="chain weight decay and the like after project"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


@pytest.mark.slow
def test_accumulated_gradients_are_projected_together():
    tx = project(optax.adam(0.1), rank=2, every=2)
    pairs = [jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[n : n + 2]) for n in (0, 2, 4, 6)]
    params, *_ = train(optax.MultiSteps(tx, 2), 8)
    assert_close(params, train(tx, 4, pairs)[0], 1e-5)


def test_masked_and_injected():
    tx = optax.masked(
        project(optax.trace(0.9), rank=2), lambda params: tree.map_named(lambda p, _: "up" in p, params)
    )
    masked = train(tx, 2)[2][0]
    np.testing.assert_array_equal(masked["down"]["kernel"], GRADS[0]["down"]["kernel"])
    assert np.linalg.matrix_rank(masked["up"]["kernel"][0]) == 2
    injected = optax.inject_hyperparams(project, static_args=("rank", "every"))
    tx = injected(inner=optax.trace(0.9), rank=2, every=2, scale=0.5)
    assert_close(train(tx, 3)[0], train(project(optax.trace(0.9), rank=2, every=2, scale=0.5), 3)[0])


def test_buffers_can_be_donated():
    tx = project(optax.adam(0.1), rank=2, every=2)
    params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    step = jax.jit(lambda g, s, p: (*tx.update(g, s, p), p), donate_argnums=(1, 2))
    for grads in GRADS[:3]:
        updates, state, params = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, train(tx, 3)[0])
