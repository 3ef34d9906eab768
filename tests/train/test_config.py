from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftjax.core.errors import PeftError
from peftjax.train.config import Optimizer, TrainConfig, plan_steps, validate
from peftjax.train.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "addamw"}, r"one of adamw, adam, .*; did you mean 'adamw'\?"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"batch_size": 0}, "batch_size is 0, but has to be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, but has to be a positive"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5, but has to be from 0 to 1"),
        ({"keep_best": -1}, "keep_best is -1, but has to be at least 0"),
        ({"batch_size": 10, "grad_accumulation": 4}, "4 equal parts"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "sgd has no weight_decay"),
    ],
)
def test_validate(changes, message):
    with pytest.raises(PeftError, match=message):
        validate(replace(TrainConfig(), **changes))


def test_the_defaults_are_valid():
    validate(TrainConfig())


def test_plan_steps():
    steps = plan_steps(TrainConfig(epochs=2.5, batch_size=32), examples=100)
    assert (steps.total, steps.evaluate, steps.save) == (8, 4, 50)
    assert [t for t in range(1, 9) if steps.evaluates(t)] == [4, 8]
    assert [t for t in range(1, 9) if steps.saves(t)] == [8]
    steps = plan_steps(TrainConfig(steps=7, eval_every=3, save_every=2), examples=100)
    assert [t for t in range(1, 8) if steps.evaluates(t)] == [3, 6, 7]
    assert [t for t in range(1, 8) if steps.saves(t)] == [2, 4, 6, 7]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate(schedule, expected):
    config = TrainConfig(learning_rate=2.0, schedule=schedule, warmup_ratio=1 / 3)
    rate = learning_rate(config, steps=6)
    np.testing.assert_allclose([rate(t) for t in range(6)], 2 * np.array(expected), rtol=1e-5)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(TrainConfig(learning_rate=2.0, warmup_ratio=0.0), 10)(0) == 2.0


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_every_optimizer_leaves_zero(optimizer):
    config = TrainConfig(optimizer=optimizer, learning_rate=0.1, warmup_ratio=0.0)
    tx = make_optimizer(config, steps=30)
    params = {"w": jnp.zeros((3, 2))}

    def loss(params):
        return jnp.sum((params["w"] - 1.0) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(30):
        params, state = step(params, state)
    assert loss(params) < 0.1 * loss({"w": jnp.zeros((3, 2))})


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_eight_bits_change_large_moments_and_keep_weight_decay(name):
    configs = [TrainConfig(optimizer=o, learning_rate=0.1, weight_decay=0.1) for o in (name, f"{name}8bit")]
    whole, coded = (make_optimizer(config, steps=9) for config in configs)
    small, large = {"w": jnp.ones((3, 2))}, {"w": jnp.ones((64, 64))}
    wanted = whole.update(small, whole.init(small), small)[0]["w"]
    np.testing.assert_array_equal(coded.update(small, coded.init(small), small)[0]["w"], wanted)
    assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(coded.init(large)))
    validate(configs[1])


def test_clip_norm():
    params = {"w": jnp.zeros(4)}
    for clip, expected in ((1.0, 0.5), (None, 5.0)):
        config = TrainConfig(
            optimizer="sgd", learning_rate=1.0, clip_norm=clip, schedule="constant", warmup_ratio=0
        )
        tx = make_optimizer(config, 10)
        updates, _ = tx.update({"w": jnp.full(4, 5.0)}, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -expected, rtol=1e-6)
