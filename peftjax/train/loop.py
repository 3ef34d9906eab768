"""The training loop: `make_step` with data, evaluation, early stopping, metrics, checkpoints."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from peftjax.core.errors import PeftError
from peftjax.io import checkpoint
from peftjax.io.checkpoint import RunState
from peftjax.io.files import checked
from peftjax.io.lock import at_work
from peftjax.losses import Batch, Objective, classification
from peftjax.train.config import Metric, Steps, TrainConfig
from peftjax.train.early_stopping import Best, is_over, update
from peftjax.train.metrics import open_metrics
from peftjax.train.optimizer import learning_rate, make_optimizer
from peftjax.train.output_folder import claim_folder
from peftjax.train.progress import show_progress
from peftjax.train.step import (
    Evaluate,
    Forward,
    Metrics,
    Renew,
    Step,
    make_evaluate,
    make_renewals,
    make_step,
    make_write,
)
from peftjax.train.throughput import Throughput, peak_memory
from peftjax.transform.transform import Transform


@dataclass(frozen=True)
class FitResult:
    """What a run ends with."""

    trainable: PyTree[Array]
    """The best parameters where the run has evaluations and best checkpoints, else the last."""
    step: int
    """The last step done."""
    best: Best
    """The best evaluation."""


def fit(
    forward: Forward,
    method: Transform,
    frozen: PyTree[Array],
    trainable: PyTree[Array],
    batches: grain.DatasetIterator,
    held_out: Callable[[], Iterable[Batch]] | None,
    *,
    config: TrainConfig,
    steps: Steps,
    key: Key[Array, ""],
    directory: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    objective: Objective = classification,
    evaluate: Evaluate | None = None,
) -> FitResult:
    """Train, and continue exactly where an interrupted run with the same `directory` stopped.

    Args:
        forward: the model as the method rewrites it: `method.model(model)`.
        method: gives `apply` and `optimizer`.
        frozen: what `method.init` returned and is not trained; of a method in place, a copy is written.
        trainable: what `method.init` returned to be trained; it is copied, not donated.
        batches: endless training batches whose iterator has `get_state` and `set_state`.
        held_out: makes the evaluation batches, anew for each evaluation; None never evaluates.
        config: the options; `validate` and `with_defaults` have passed.
        steps: when what happens, from `plan_steps`.
        key: the run's key; step t uses `fold_in(key, t)`.
        directory: for checkpoints (`checkpoints/`), metrics and identity; None writes nothing.
        identity: of the run, from `run_identity`, compared with what `directory` belongs to.
        objective: loss and scores of a batch.
        evaluate: from `make_evaluate` of the same, where the caller shares what it compiled.

    Raises:
        PeftError: `directory` belongs to another run or another process is at work in it, or a loss or
            gradient is not finite.
    """
    tx = method.optimizer(make_optimizer(config, steps.total))
    rate = learning_rate(config, steps.total)
    step_fn = make_step(
        forward,
        method,
        tx,
        objective,
        accumulation=config.grad_accumulation,
        model_dropout=config.model_dropout,
    )
    renewals = make_renewals(forward, method, objective, accumulation=config.grad_accumulation)
    evaluate = evaluate or make_evaluate(forward, method, objective)
    # A leaf may be shared with `params`, or by the optimizer's state: donate copies only.
    trainable = jax.tree.map(jnp.copy, trainable)
    opt_state = jax.tree.map(jnp.copy, tx.init(trainable))
    state = RunState(trainable, opt_state, key, 0, {}, dataclasses.asdict(Best()))

    with contextlib.ExitStack() as stack:
        checkpoints = None
        if directory is not None:
            if jax.process_index() == 0:
                stack.enter_context(at_work(directory))
            claim_folder(directory, identity or {})
            checkpoints = stack.enter_context(
                checkpoint.open_checkpoints(
                    directory / "checkpoints",
                    keep_last=config.keep_last,
                    keep_best=config.keep_best,
                )
            )
            found = checkpoint.restore_latest(checkpoints, state)
            if found is not None:
                state = found
                batches.set_state(state.data)
        written = make_write(method) if method.in_place else lambda frozen, _: frozen
        if method.in_place:
            # Made again from what is trained: a checkpoint holds none of the base.
            frozen = written(jax.tree.map(lambda leaf: leaf.copy(), frozen), state.trainable)
        write = stack.enter_context(open_metrics(directory, state.step, tensorboard=config.tensorboard))
        report = stack.enter_context(show_progress(steps.total, state.step))
        best = checked(Best, state.progress, f"the checkpoint of step {state.step}")
        throughput = Throughput()
        pending: list[tuple[int, Metrics]] = []

        while state.step < steps.total and not is_over(best, config.early_stopping_patience):
            batch = next(batches)
            throughput.before(batch)
            for renewal in renewals:
                if renewal.due(state.step):
                    state = _renewed(renewal, state, frozen, batch)
            state, metrics = _advance(step_fn, state, frozen, batch)
            frozen = written(frozen, state.trainable)
            throughput.after(batch, metrics)
            pending.append((state.step, metrics))

            evaluates = held_out is not None and steps.evaluates(state.step)
            saves = evaluates or steps.saves(state.step)
            if not (saves or steps.logs(state.step)):
                continue
            values = _check_finite(pending)
            throughput.stop()
            score = None
            if steps.logs(state.step):
                values["learning_rate"] = float(rate(state.step - 1))
                values |= throughput.take() | peak_memory()
                write(state.step, values)
                report(state.step, values)
            if evaluates:
                results = evaluate(state.trainable, frozen, held_out())
                values = {f"eval_{name}": value for name, value in results.items()}
                write(state.step, values)
                report(state.step, values)
                score = _score(results, config.best_by, state.step)
                best = update(best, state.step, score)
            if saves and checkpoints is not None:
                progress = dataclasses.asdict(best)
                state = dataclasses.replace(state, data=batches.get_state(), progress=progress)
                checkpoint.save(checkpoints, state, score)
            throughput.start()

        trainable = state.trainable
        if checkpoints is not None and config.keep_best and best.step is not None:
            trainable = _best_trainable(checkpoints, best.step, trainable)
    return FitResult(trainable, state.step, best)


def _best_trainable(checkpoints: checkpoint.Checkpoints, step: int, like: PyTree[Array]) -> PyTree[Array]:
    """The trainable arrays of the best checkpoint.

    Raises:
        PeftError: it is lost.
    """
    try:
        return checkpoint.restore_trainable(checkpoints, step, like)
    except PeftError as error:
        raise PeftError(
            f"{error}; it was the best one: with keep_best 0 the run ends with its last parameters"
        ) from error


def _advance(step_fn: Step, state: RunState, frozen: PyTree[Array], batch: Batch) -> tuple[RunState, Metrics]:
    """One step; the arrays of `state` are donated."""
    step = state.step + 1
    key = jax.random.fold_in(state.key, step)
    trainable, opt_state, metrics = step_fn(state.trainable, state.opt_state, frozen, batch, key)
    return (
        dataclasses.replace(state, trainable=trainable, opt_state=opt_state, step=step),
        metrics,
    )


def _renewed(renewal: Renew, state: RunState, frozen: PyTree[Array], batch: Batch) -> RunState:
    """What the method does before the next step; the arrays of `state` are donated."""
    # Not the key of the step itself.
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step + 1), 1)
    count = jnp.asarray(state.step, jnp.int32)
    trainable, opt_state = renewal.run(state.trainable, state.opt_state, frozen, batch, count, key)
    return dataclasses.replace(state, trainable=trainable, opt_state=opt_state)


def _check_finite(pending: list[tuple[int, Metrics]]) -> dict[str, float | int | None]:
    """Wait for the steps since the last call; the values of the newest one.

    Raises:
        PeftError: names the first step whose loss or gradient is not finite.
    """
    values: dict[str, float | int | None] = {}
    for step, metrics in pending:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise PeftError(
                    f"the {name} of step {step} is {values[name]}: lower learning_rate, set "
                    "clip_norm or compute in float32; the last checkpoint is from before it"
                )
    pending.clear()
    return values


def _score(results: Mapping[str, float], best_by: Metric, step: int) -> float:
    """An evaluation's result as a score, higher is better."""
    if best_by not in results:
        raise PeftError(f"best_by is '{best_by}', but the evaluation gives {', '.join(results)}")
    value = results[best_by]
    if not math.isfinite(value):
        raise PeftError(f"the evaluation after step {step} gave {best_by} {value}")
    return -value if best_by == "loss" else value
