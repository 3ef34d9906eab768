"""The training loop of an entrant, compiled once for all its seeds and learning rates."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import peftjax as pj
from peftjax.backbone.backbone import Backbone, Params
from peftjax.losses import Batch, classification
from peftjax.train.step import Evaluate, Renew, Step, make_evaluate, make_renewals, make_step

Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]
CLIP = 1.0
"""Norm to which gradients are clipped as the optimizer is given them: projected ones, or those of factors."""
Visit = Callable[[int, Any, Any], None]
"""`(step, frozen, trainable)`."""
WARMUP = 0.1
LAST = 0.1
"""Shares: of the steps, for the learning rate to rise; of the peak, that is left after the last step."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a method compiles.

    Attributes:
        method: the method.
        tx: the optimizer with the method's hook, its peak learning rate in the state.
        step: one training step.
        renewals: what the method does between steps.
        evaluate: `(trainable, frozen, batches) -> means`.
    """

    method: pj.Transform
    tx: optax.GradientTransformation
    step: Step
    renewals: tuple[Renew, ...]
    evaluate: Evaluate


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves.

    Attributes:
        frozen: from the method's `init`.
        trainable: after the last step.
        curve: `(step, loss)` on the batches given for it; it ends early where a loss was not finite.
        seconds: of the whole run.
    """

    frozen: Any
    trainable: Any
    curve: list[tuple[int, float]]
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the last loss is not finite."""
        return not math.isfinite(self.curve[-1][1])


def schedule(peak: jax.Array | float, steps: int) -> optax.Schedule:
    """A rise over the first tenth of the steps, then a cosine down to a tenth of the peak."""
    rise = max(1, round(WARMUP * steps))
    shape = optax.warmup_cosine_decay_schedule(1 / (rise + 1), 1.0, rise, steps, end_value=LAST)
    return lambda count: peak * shape(count)


def compile_programs(model: Backbone, method: pj.Transform, optimizer: Optimizer, steps: int) -> Programs:
    """The programs of a method; its peak learning rate is an array, so that another one compiles nothing."""

    def with_peak(peak: jax.Array) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(CLIP), optimizer(schedule(peak, steps)))

    forward = method.model(model)
    tx = method.optimizer(optax.inject_hyperparams(with_peak)(peak=1.0))
    return Programs(
        method,
        tx,
        make_step(forward, method, tx, classification),
        make_renewals(forward, method, classification),
        make_evaluate(forward, method, classification),
    )


def train(
    programs: Programs,
    params: Params,
    batches: Iterator[Batch],
    watched: Sequence[Batch],
    *,
    rate: float,
    seed: int,
    steps: int,
    every: int,
    visit: Visit = lambda step, frozen, trainable: None,
) -> Trained:
    """One run from given parameters.

    Args:
        programs: of the method.
        params: where it starts.
        batches: to train on.
        watched: to evaluate on, before the first step, after every `every` steps and after the last.
        rate: peak learning rate.
        seed: of what the method draws.
        steps: as the programs were compiled for.
        every: steps between evaluations.
        visit: called with what there is at each of them.
    """
    key = jax.random.key(seed)
    frozen, trainable = programs.method.init(key, params)
    # A step takes its memory, which the frozen part or the optimizer's state may share.
    trainable = jax.tree.map(jnp.copy, trainable)
    state = optax.tree.set(programs.tx.init(trainable), peak=jnp.float32(rate))
    state = jax.tree.map(jnp.copy, state)
    curve: list[tuple[int, float]] = []

    def look(step: int) -> bool:
        visit(step, frozen, trainable)
        curve.append((step, programs.evaluate(trainable, frozen, watched)["loss"]))
        return math.isfinite(curve[-1][1])

    started = time.perf_counter()
    look(0)
    for number in range(steps):
        batch, own = next(batches), jax.random.fold_in(key, number)
        for renewal in programs.renewals:
            if renewal.due(number):
                between = jnp.asarray(number, jnp.int32), jax.random.fold_in(own, 1)
                trainable, state = renewal.run(trainable, state, frozen, batch, *between)
        trainable, state, _ = programs.step(trainable, state, frozen, batch, own)
        if ((number + 1) % every == 0 or number + 1 == steps) and not look(number + 1):
            break
    return Trained(frozen, trainable, curve, time.perf_counter() - started)


def score(programs: Programs, trained: Trained, batches: Iterable[Batch]) -> float | None:
    """The loss of what was trained, None where the run diverged."""
    if trained.diverged:
        return None
    return programs.evaluate(trained.trainable, trained.frozen, batches)["loss"]
