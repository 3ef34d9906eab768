"""The training loop: the step with data, evaluation, early stopping, metrics, checkpoints."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree
from rich.console import Console

from peftjax.core.errors import PeftError
from peftjax.io import checkpoint
from peftjax.io.checkpoint import RunState
from peftjax.io.files import checked
from peftjax.io.lock import at_work
from peftjax.losses import Batch, Objective, classification
from peftjax.parallel.lost import names_lost
from peftjax.parallel.placement import shard_batch, shard_state
from peftjax.parallel.processes import is_first
from peftjax.train.config import Metric, Steps, TrainConfig
from peftjax.train.early_stopping import Best, is_over, update
from peftjax.train.evaluate import Evaluate, make_evaluate
from peftjax.train.gradient import Metrics
from peftjax.train.interrupt import Preempted, stop_requests
from peftjax.train.metrics import open_metrics
from peftjax.train.optimizer import learning_rate, make_optimizer
from peftjax.train.output_folder import claim_folder
from peftjax.train.progress import show_progress
from peftjax.train.step import Forward, Training, TrainingState, model_loss, training
from peftjax.train.throughput import Throughput, peak_memory
from peftjax.transform.frozen import Frozen
from peftjax.transform.transform import Transform, changing_state, with_changing_state


@dataclass(frozen=True)
class FitResult:
    """What a run ends with."""

    trainable: PyTree[Array]
    """The best parameters where the run has evaluations and best checkpoints, else the last."""
    frozen: Frozen
    """What belongs to them: the method's own state, and the base of a method in place, have moved."""
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
    mesh: Mesh | None = None,
) -> FitResult:
    """Train, and continue exactly where an interrupted run with the same `directory` stopped.

    Args:
        forward: the model as the method rewrites it: `method.model(model)`.
        method: gives `apply` and `optimizer`.
        frozen: what `method.init` returned and is not trained; it stays as it is.
        trainable: what `method.init` returned to be trained; it stays as it is.
        batches: endless training batches whose iterator has `get_state` and `set_state`.
        held_out: makes the evaluation batches, anew for each evaluation; None never evaluates.
        config: the options; `validate` and `with_defaults` have passed.
        steps: when to log, evaluate and save, from `plan_steps`.
        key: the run's key; step t uses `fold_in(key, t)`.
        directory: for checkpoints (`checkpoints/`), metrics and identity; None writes nothing.
        identity: of the run, from `run_identity`, compared with what `directory` belongs to.
        objective: loss and scores of a batch.
        evaluate: from `make_evaluate` of the same, where the caller shares what it compiled.
        mesh: on which the parameters lie: what is trained, the optimizer's state and batches lie on it too.

    Raises:
        PeftError: `directory` belongs to another run or another process is at work in it, or a loss or
            gradient is not finite.
        LostProcess: another process of the run is gone.
        Preempted: SIGTERM has come; `directory` has a checkpoint of the step after it.
    """
    loss = model_loss(forward, objective, model_dropout=config.model_dropout)
    tx = make_optimizer(config, steps.total)
    run = training(
        method,
        loss,
        tx,
        accumulation=config.grad_accumulation,
        grad_norm=True,
        optimizer_memory=config.optimizer_memory,
    )
    rate = learning_rate(config, steps.total)
    evaluate = evaluate or make_evaluate(forward, method, objective, mesh)
    state = run.begin(frozen, trainable, key)
    if mesh is not None:
        state = shard_state(state, mesh)
    best = Best()

    with contextlib.ExitStack() as stack:
        checkpoints = stops = None
        if directory is not None:
            if is_first():
                stack.enter_context(at_work(directory))
            claim_folder(directory, identity or {})
            checkpoints = stack.enter_context(
                checkpoint.open_checkpoints(
                    directory / "checkpoints",
                    keep_last=config.keep_last,
                    keep_best=config.keep_best,
                )
            )
            found = checkpoint.restore_latest(checkpoints, _run_state(method, state, {}, best))
            if found is not None:
                state = _restored(run, state, found)
                batches.set_state(found.data)
                best = checked(Best, found.progress, f"the checkpoint of step {found.step}")
            stops = stack.enter_context(stop_requests(checkpoints.reached_preemption))
        own = directory if is_first() else None
        write = stack.enter_context(open_metrics(own, state.step, tensorboard=config.tensorboard))
        quiet = Console(stderr=True, quiet=not is_first())
        report = stack.enter_context(show_progress(steps.total, state.step, quiet))
        throughput = Throughput()
        pending: list[tuple[int, Metrics]] = []
        stack.enter_context(names_lost())

        while state.step < steps.total and not is_over(best, config.early_stopping_patience):
            batch = next(batches)
            throughput.before(batch)
            state, metrics = run.step(state, batch if mesh is None else shard_batch(batch, mesh))
            throughput.after(batch, metrics)
            pending.append((state.step, metrics))

            stopping = stops is not None and stops(state.step)
            evaluates = held_out is not None and steps.evaluates(state.step)
            saves = evaluates or stopping or steps.saves(state.step)
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
                results = evaluate(state.trainable, state.frozen, held_out())
                values = {f"eval_{name}": value for name, value in results.items()}
                write(state.step, values)
                report(state.step, values)
                score = _score(results, config.best_by, state.step)
                best = update(best, state.step, score)
            if saves and checkpoints is not None:
                checkpoint.save(checkpoints, _run_state(method, state, batches.get_state(), best), score)
            if stopping:
                raise Preempted
            throughput.start()

        if checkpoints is not None and config.keep_best and best.step is not None:
            state = _best(checkpoints, best.step, run, state)
    return FitResult(state.trainable, state.frozen, state.step, best)


def _moved(method: Transform, state: TrainingState) -> PyTree[Array]:
    """What changes in a run: the trainable, and what a method changes of its own state."""
    changing = changing_state(method, state.frozen.state)
    return {"trainable": state.trainable, "state": changing} if changing else state.trainable


def _with_moved(run: Training, state: TrainingState, moved: PyTree[Array]) -> TrainingState:
    """The state with what `_moved` took out of another one; the base of a method in place has its values."""
    frozen, trainable = state.frozen, moved
    if changing_state(run.method, frozen.state):
        trainable = moved["trainable"]
        frozen = dataclasses.replace(frozen, state=with_changing_state(frozen.state, moved["state"]))
    frozen, trainable = run.close(frozen, trainable)
    return dataclasses.replace(state, frozen=frozen, trainable=trainable)


def _run_state(method: Transform, state: TrainingState, data: dict[str, Any], best: Best) -> RunState:
    """What a checkpoint holds of a run: none of the base."""
    progress = dataclasses.asdict(best)
    return RunState(_moved(method, state), state.opt_state, state.key, state.step, data, progress)


def _restored(run: Training, state: TrainingState, found: RunState) -> TrainingState:
    state = dataclasses.replace(state, opt_state=found.opt_state, key=found.key, step=found.step)
    return _with_moved(run, state, found.trainable)


def _best(
    checkpoints: checkpoint.Checkpoints, step: int, run: Training, state: TrainingState
) -> TrainingState:
    """The state with what the best checkpoint has of the parameters.

    Raises:
        PeftError: it is lost.
    """
    like = _moved(run.method, state)
    try:
        return _with_moved(run, state, checkpoint.restore_trainable(checkpoints, step, like))
    except PeftError as error:
        raise PeftError(
            f"{error}; it was the best one: with keep_best 0 the run ends with its last parameters"
        ) from error


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
