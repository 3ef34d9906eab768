"""The training loop of a method, compiled once for all its seeds and learning rates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax.backbone.backbone import Backbone
from peftjax.losses import Batch, classification
from peftjax.train.config import TrainConfig
from peftjax.train.optimizer import make_optimizer
from peftjax.train.step import make_evaluate, make_step

Start = tuple[Any, Any]
"""`(frozen, trainable)`."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What one training run leaves.

    Attributes:
        frozen: from the method's `init`.
        trainable: after the last step.
        seconds: per step, the median over the steps that did not compile; None where all did.
        compiled_seconds: all steps that did compile.
        loss: of the last step's batch; a run ends where it is not finite.
    """

    frozen: Any
    trainable: Any
    seconds: float | None
    compiled_seconds: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A method's programs.

    Attributes:
        fit: `(start, batches, rate, seed) -> Fitted`, where `start` is what the method's `init` returned, and
            the seed drives dropout. It may come from a method that differs from the compiled one in what only
            `init` reads, such as the gradients that choose a mask.
        evaluate: `(fitted, batches) -> {"loss", "accuracy"}`.
    """

    fit: Callable[[Start, Iterable[Batch], float, int], Fitted]
    evaluate: Callable[[Fitted, Iterable[Batch]], dict[str, float]]


def make_trainer(model: Backbone, method: pj.Transform, steps: int) -> Trainer:
    """The loop of `peftjax train`: AdamW without weight decay, gradients clipped to norm 1, a learning
    rate that rises over 6 % of the steps and falls linearly to zero.

    The peak learning rate lies in the optimizer's state, so that another one compiles nothing.
    """

    def with_peak(peak: jax.Array) -> optax.GradientTransformation:
        return make_optimizer(TrainConfig(learning_rate=peak), steps)

    forward = method.model(model)
    tx = method.optimizer(optax.inject_hyperparams(with_peak)(peak=0.0))
    step = make_step(forward, method, tx, classification)
    score = make_evaluate(forward, method, classification)
    seen: set[tuple[int, ...]] = set()

    def fit(start: Start, batches: Iterable[Batch], rate: float, seed: int) -> Fitted:
        frozen, trainable = start
        trainable = jax.tree.map(jnp.copy, trainable)  # a step takes its memory
        key = jax.random.key(seed)
        state = jax.tree.map(jnp.copy, optax.tree.set(tx.init(trainable), peak=jnp.float32(rate)))
        seconds, compiled, loss = [], 0.0, float("nan")
        for number, batch in zip(range(1, steps + 1), batches):
            started = time.perf_counter()
            trainable, state, metrics = step(trainable, state, frozen, batch, jax.random.fold_in(key, number))
            loss = float(metrics["loss"])
            elapsed = time.perf_counter() - started
            shape = batch["labels"].shape + next(iter(batch.values())).shape
            if shape in seen:
                seconds.append(elapsed)
            else:
                compiled += elapsed
            seen.add(shape)
            if not np.isfinite(loss):
                break
        return Fitted(frozen, trainable, float(np.median(seconds)) if seconds else None, compiled, loss)

    def evaluate(fitted: Fitted, batches: Iterable[Batch]) -> dict[str, float]:
        return score(fitted.trainable, fitted.frozen, batches)

    return Trainer(fit, evaluate)
