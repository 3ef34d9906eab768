"""The race's training step in peftjax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import peftjax as pj
from experiments.versus_peft.config import Race, Racer, tokens
from peftjax.core import tree


def prepare(folder: Path, racer: Racer, race: Race) -> tuple[Callable[[], int], Callable[[], Any]]:
    """`load() -> trained parameters` and, after it, `compiled() -> step`."""
    method = pj.lora(rank=race.rank, alpha=2 * race.rank) if racer.method == "lora" else pj.full()
    tx = method.optimizer(optax.adamw(race.learning_rate, weight_decay=0.0))
    held: dict[str, Any] = {}

    def load() -> int:
        model, params = pj.load(folder, head="causal_lm")
        held["model"] = dataclasses.replace(model, remat="nothing_saveable" if racer.checkpointing else None)
        held["frozen"], held["trainable"] = method.init(jax.random.key(0), params)
        return tree.count(held["trainable"])

    def compiled() -> Callable[[int], float]:
        model, frozen = held["model"], held["frozen"]

        def loss_fn(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
            return pj.losses.cross_entropy(pj.adapt(model)(method.apply(frozen, trainable), batch), batch)

        def train(trainable: Any, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            loss, gradients = jax.value_and_grad(loss_fn)(trainable, frozen, batch)
            updates, state = tx.update(gradients, state, trainable)
            return optax.apply_updates(trainable, updates), state, loss

        held["state"] = tx.init(held["trainable"])
        inputs = (held["trainable"], held["state"], frozen, _batch(race, 0))
        program = jax.jit(train, donate_argnums=(0, 1)).lower(*inputs).compile()

        def step(number: int) -> float:
            inputs = (held["trainable"], held["state"], frozen, _batch(race, number))
            held["trainable"], held["state"], loss = program(*inputs)
            return float(loss)

        return step

    return load, compiled


def _batch(race: Race, number: int) -> dict[str, jax.Array]:
    ids = tokens(race, number)
    return {"input_ids": jax.numpy.asarray(ids[:, :-1]), "labels": jax.numpy.asarray(ids[:, 1:])}
