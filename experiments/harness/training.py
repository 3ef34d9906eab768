"""The training loop of all experiments: the library's step, compiled once for all seeds and rates."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

import peftjax as pj
from peftjax.backbone.backbone import Backbone, Params
from peftjax.losses import Batch, classification
from peftjax.train.config import TrainConfig
from peftjax.train.evaluate import make_evaluate
from peftjax.train.gradient import Metrics
from peftjax.train.optimizer import make_optimizer
from peftjax.train.step import TrainingState, model_loss

Optimizer = Callable[[jax.Array], optax.GradientTransformation]
"""The optimizer of a peak learning rate, which is an array in its state: another one compiles nothing."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """A method's programs.

    Attributes:
        start: `(method, params, rate, seed) -> state`; the method may differ from the compiled one in what
            only `init` reads, such as the gradients that choose a mask. The seed drives what it draws.
        advance: `(state, batch) -> state`, what the method does before the next step, where it is due.
        step: `(state, batch) -> (state, metrics)`: advance, gradient, update.
        evaluate: `(state, batches) -> means`.
        compiled: the shapes of the batches that the step is compiled for.
    """

    start: Callable[[pj.Transform, Params, float, int], TrainingState]
    advance: Callable[[TrainingState, Batch], TrainingState]
    step: Callable[[TrainingState, Batch], tuple[TrainingState, Metrics]]
    evaluate: Callable[[TrainingState, Iterable[Batch]], dict[str, float]]
    compiled: set[tuple[int, ...]] = dataclasses.field(default_factory=set)


def make_programs(model: Backbone, method: pj.Transform, optimizer: Optimizer) -> Programs:
    """The programs of a method. All that the experiments use of the library's step is in this function."""
    forward = method.model(model)
    tx = optax.inject_hyperparams(optimizer)(peak=1.0)
    training = pj.training(method, model_loss(forward, classification), tx)
    score = make_evaluate(forward, method, classification)

    def start(method: pj.Transform, params: Params, rate: float, seed: int) -> TrainingState:
        key = jax.random.key(seed)
        state = training.begin(*method.init(key, params), key)
        return dataclasses.replace(state, opt_state=optax.tree.set(state.opt_state, peak=jnp.float32(rate)))

    def evaluate(state: TrainingState, batches: Iterable[Batch]) -> dict[str, float]:
        return score(state.trainable, state.frozen, batches)

    return Programs(start, training.advance, training.step, evaluate)


def finetuning_optimizer(steps: int) -> Optimizer:
    """That of `peftjax train`, of a peak learning rate: AdamW without weight decay, gradients clipped to
    norm 1, a learning rate that rises over 6 % of the steps and falls linearly to zero.
    """
    return lambda peak: make_optimizer(TrainConfig(learning_rate=peak), steps)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves.

    Attributes:
        state: after the last step.
        loss: of the last step's batch; a run ends where it is not finite.
        step_seconds: the median over the steps that did not compile; None where all did.
        compile_seconds: all steps that did compile.
        seconds: of the whole run.
    """

    state: TrainingState
    loss: float
    step_seconds: float | None
    compile_seconds: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the last loss is not finite."""
        return not math.isfinite(self.loss)


def train(
    programs: Programs,
    state: TrainingState,
    batches: Iterable[Batch],
    steps: int,
    *,
    every: int = 0,
    visit: Callable[[TrainingState], None] = lambda state: None,
) -> Trained:
    """One run.

    Args:
        programs: of the method.
        state: where it starts; its memory is taken.
        batches: to train on, at least as many as steps.
        steps: optimizer steps.
        every: steps between visits; 0 for none between the first and the last.
        visit: called with the state before the first step, after every `every` steps and at the end.
    """
    started = time.perf_counter()
    visit(state)
    seconds: list[float] = []
    compiling, loss = 0.0, float("nan")
    for number, batch in zip(range(1, steps + 1), batches):
        before = time.perf_counter()
        state, metrics = programs.step(state, batch)
        loss = float(metrics["loss"])
        elapsed = time.perf_counter() - before
        shape = batch["labels"].shape + next(iter(batch.values())).shape
        if shape in programs.compiled:
            seconds.append(elapsed)
        else:
            compiling += elapsed
        programs.compiled.add(shape)
        ended = number == steps or not math.isfinite(loss)
        if ended or (every and number % every == 0):
            visit(state)
        if ended:
            break
    median = statistics.median(seconds) if seconds else None
    return Trained(state, loss, median, compiling, time.perf_counter() - started)
