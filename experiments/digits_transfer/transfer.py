"""From the digits 0-4 to the digits 5-9, with a few images of each: one method, all seeds and rates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import peftjax as pj
from experiments.digits_transfer.data import Images, draw, of_classes, training_batches
from experiments.digits_transfer.pretrain import KNOWN, Pretrained
from experiments.harness import contenders
from experiments.harness.contenders import Contender, adapter_size, calibrated
from experiments.harness.training import Trained, finetuning_optimizer, make_programs, train
from peftjax.backbone.backbone import Params


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The task, and how every method is tuned on it."""

    shots: int = 10
    """Images of each class to train on."""
    validation: int = 20
    """Images of each class to choose the learning rate by."""
    test: int = 90
    """Images of each class to test on, the same for all seeds."""
    seeds: int = 5
    """Runs of each method at each rate."""
    steps: int = 150
    """Optimizer steps."""
    batch: int = 25
    """Images a step."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Peak learning rates, the same for all methods."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a seed stands for: images, a new classifier, and (in `transfer`) the adapter and the order."""

    seed: int
    params: Params
    train: Images
    validation: Images


def make_tasks(images: Images, base: Pretrained, options: Transfer) -> tuple[list[Task], Images]:
    """A task for each seed, and the test images of all."""
    new = of_classes(images, KNOWN, KNOWN)
    test, rest = draw(new, options.test, np.random.default_rng(0))
    tasks = []
    for seed in range(options.seeds):
        generator = np.random.default_rng(1 + seed)
        train, left = draw(rest, options.shots, generator)
        validation, _ = draw(left, options.validation, generator)
        drawn = base.model.init_head(jax.random.key(1 + seed), base.params["embed"])
        head = {**base.params["head"], "classifier": drawn["classifier"]}
        tasks.append(Task(seed, {**base.params, "head": head}, train, validation))
    return tasks, test


def make_method(contender: Contender, base: Pretrained, task: Task, options: Transfer) -> pj.Transform:
    """The contender's method for a seed."""
    setting = calibrated(options.steps, base.model, task.params, lambda: [task.train.batch()])
    return contenders.make_method(contender, setting, base.model, task.params)


def transfer(
    contender: Contender,
    base: Pretrained,
    tasks: list[Task],
    test: Images,
    options: Transfer,
    advance: Callable[[str], None] = lambda done: None,
) -> dict[str, Any]:
    """Train at every rate from every seed; test at the rate with the best mean validation accuracy.

    Of equally accurate rates the one with the lower mean validation loss is taken. The test images are
    looked at once, at that rate.

    Args:
        contender: the method.
        base: the model to adapt.
        tasks: one for each seed.
        test: the test images.
        options: of the transfer.
        advance: called after each run with its name.

    Returns:
        A line of `experiments.harness.report`, without its label.
    """
    started = time.perf_counter()
    methods = [make_method(contender, base, task, options) for task in tasks]
    programs = make_programs(base.model, methods[0], finetuning_optimizer(options.steps))
    runs: dict[float, list[Trained]] = {}
    scores: dict[float, list[dict[str, float]]] = {}
    for rate in options.rates:
        runs[rate] = []
        for task, method in zip(tasks, methods):
            start = programs.start(method, task.params, rate, task.seed)
            batches = training_batches(task.train, options.batch, task.seed)
            runs[rate].append(train(programs, start, batches, options.steps))
            advance(f"{contender.label}, learning rate {rate:g}, seed {task.seed}")
        scores[rate] = [
            programs.evaluate(run.state, [task.validation.batch()]) for run, task in zip(runs[rate], tasks)
        ]
    best = max(options.rates, key=lambda rate: _rank(scores[rate]))
    every = [run for at_rate in runs.values() for run in at_rate]
    return {
        "matched": contender.matched,
        "trained": adapter_size(methods[0], tasks[0].params),
        "rate": best,
        "validation": {str(rate): [score["accuracy"] for score in scores[rate]] for rate in options.rates},
        "accuracy": [programs.evaluate(run.state, [test.batch()])["accuracy"] for run in runs[best]],
        "step_seconds": float(np.median([run.step_seconds for run in every if run.step_seconds])),
        "compile_seconds": sum(run.compile_seconds for run in every),
        "seconds": time.perf_counter() - started,
    }


def _rank(scores: list[dict[str, float]]) -> tuple[float, float]:
    """What a rate is chosen by, larger is better; a run that diverged has no loss."""
    accuracy, loss = (float(np.mean([score[name] for score in scores])) for name in ("accuracy", "loss"))
    return accuracy, -loss if np.isfinite(loss) else -np.inf
