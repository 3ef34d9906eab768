"""The training loop of all experiments: the library's step, compiled once for all seeds and rates."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import peftjax as pj
from peftjax.backbone.backbone import Backbone, Params
from peftjax.losses import Batch, classification
from peftjax.train.config import TrainConfig
from peftjax.train.optimizer import make_optimizer
from peftjax.train.step import make_evaluate, make_renewals, make_step, make_write

Optimizer = Callable[[jax.Array], optax.GradientTransformation]
"""The optimizer of a peak learning rate, which is an array in its state: another one compiles nothing."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["frozen", "trainable", "opt_state", "key"],
    meta_fields=["step"],
)
@dataclasses.dataclass(frozen=True)
class State:
    """A run between two steps, of which `step` are done."""

    frozen: Any
    trainable: Any
    opt_state: Any
    key: jax.Array
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Training:
    """A method's programs.

    Attributes:
        start: `(method, params, rate, seed) -> state`; the method may differ from the compiled one in what
            only `init` reads, such as the gradients that choose a mask. The seed drives what it draws.
        advance: `(state, batch) -> state`, what the method does before the next step, where it is due.
        step: `(state, batch) -> (state, loss)`: advance, gradient, update.
        evaluate: `(state, batches) -> means`.
        compiled: the shapes of the batches that the step is compiled for.
    """

    start: Callable[[pj.Transform, Params, float, int], State]
    advance: Callable[[State, Batch], State]
    step: Callable[[State, Batch], tuple[State, jax.Array]]
    evaluate: Callable[[State, Iterable[Batch]], dict[str, float]]
    compiled: set[tuple[int, ...]] = dataclasses.field(default_factory=set)


def make_training(model: Backbone, method: pj.Transform, optimizer: Optimizer) -> Training:
    """The programs of a method. All that the experiments use of the library's step is in this function."""
    forward = method.model(model)
    tx = method.optimizer(optax.inject_hyperparams(optimizer)(peak=1.0))
    update = make_step(forward, method, tx, classification)
    renewals = make_renewals(forward, method, classification)
    write = make_write(method) if method.in_place else lambda frozen, trainable: frozen
    score = make_evaluate(forward, method, classification)

    def start(method: pj.Transform, params: Params, rate: float, seed: int) -> State:
        key = jax.random.key(seed)
        frozen, trainable = method.init(key, params)
        opt_state = optax.tree.set(tx.init(trainable), peak=jnp.float32(rate))
        # A step takes its memory, which the frozen part, the parameters or the optimizer's state may share.
        trainable, opt_state = jax.tree.map(jnp.copy, trainable), jax.tree.map(jnp.copy, opt_state)
        if method.in_place:
            frozen = write(jax.tree.map(lambda leaf: leaf.copy(), frozen), trainable)
        return State(frozen, trainable, opt_state, key)

    def advance(state: State, batch: Batch) -> State:
        trainable, opt_state = state.trainable, state.opt_state
        for renewal in renewals:
            if renewal.due(state.step):
                key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
                now = jnp.asarray(state.step, jnp.int32)
                trainable, opt_state = renewal.run(trainable, opt_state, state.frozen, batch, now, key)
        return dataclasses.replace(state, trainable=trainable, opt_state=opt_state)

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        state = advance(state, batch)
        key = jax.random.fold_in(state.key, state.step)
        trainable, opt_state, metrics = update(state.trainable, state.opt_state, state.frozen, batch, key)
        frozen = write(state.frozen, trainable)
        return State(frozen, trainable, opt_state, state.key, state.step + 1), metrics["loss"]

    def evaluate(state: State, batches: Iterable[Batch]) -> dict[str, float]:
        return score(state.trainable, state.frozen, batches)

    return Training(start, advance, step, evaluate)


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

    state: State
    loss: float
    step_seconds: float | None
    compile_seconds: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the last loss is not finite."""
        return not math.isfinite(self.loss)


def train(
    training: Training,
    state: State,
    batches: Iterable[Batch],
    steps: int,
    *,
    every: int = 0,
    visit: Callable[[State], None] = lambda state: None,
) -> Trained:
    """One run.

    Args:
        training: the method's programs.
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
        state, found = training.step(state, batch)
        loss = float(found)
        elapsed = time.perf_counter() - before
        shape = batch["labels"].shape + next(iter(batch.values())).shape
        if shape in training.compiled:
            seconds.append(elapsed)
        else:
            compiling += elapsed
        training.compiled.add(shape)
        ended = number == steps or not math.isfinite(loss)
        if ended or (every and number % every == 0):
            visit(state)
        if ended:
            break
    median = statistics.median(seconds) if seconds else None
    return Trained(state, loss, median, compiling, time.perf_counter() - started)
