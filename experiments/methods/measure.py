"""The cells of the table: what a method is measured by on a task."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import peftjax as pj
from experiments.harness.contenders import Setting, adapter_size, calibrated, make_method
from experiments.harness.memory import measure
from experiments.harness.record import commit
from experiments.harness.timing import Call, measure_in_turn, repeated
from experiments.harness.training import Programs, finetuning_optimizer, make_programs, train
from experiments.methods.entries import LORA, Entry, entry_of
from experiments.methods.tasks import Task
from experiments.pretrain_bytes.run import best_rate
from peftjax.backbone.backbone import Params
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.train.step import TrainingState

Column = Literal["plan", "disk", "score", "time"]
Cell = dict[str, Any]
CALIBRATION = 8
"""Batches that statistics before training are of."""


def plan_cell(task: Task, entry: Entry, target: str) -> Cell:
    """Trained numbers, and what one step keeps, needs at its peak, and computes, by the target's compiler."""
    model = task.shapes.backbone()
    params = task.shapes.params(model)
    method = make_method(entry.contender, Setting(task.steps), model, params)
    found = measure(task.shapes, entry.contender, Setting(task.steps), target)
    if "peak" not in found:
        return {"reason": found["reason"]}
    kept = ("kept", "peak", "flops", "device", "jax", "commit")
    return {"trained": adapter_size(method, params), **{name: found[name] for name in kept}}


def disk_cell(task: Task, entry: Entry) -> Cell:
    """The bytes of a fresh adapter's files, of which the head is a part."""
    model, params = task.shapes.backbone(), _drawn(task)
    method = make_method(entry.contender, Setting(task.steps), model, params)
    frozen, trainable = method.init(jax.random.key(0), params)
    with tempfile.TemporaryDirectory() as folder:
        pj.adapters.save_adapter(folder, method, frozen, trainable, seed=0)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {"bytes": size, "commit": commit()}


@cache
def _drawn(task: Task) -> Params:
    """Parameters of the model that no one has trained."""
    return jax.jit(task.shapes.backbone().init)(jax.random.key(0))


def score_cell(task: Task, entry: Entry, seeds: int) -> Cell:
    """The test score of each seed, and what was forgotten, at the rate that is best on held-out data.

    The rate is chosen with seed 0: of accuracies the highest is best, of equal ones that with the lower loss.
    """
    started = time.perf_counter()
    tried: dict[float, list[float]] = {}

    @cache
    def method_of(seed: int) -> pj.Transform:
        return _method(task, entry, seed)

    @cache
    def programs_of(seed: int) -> Programs:
        return make_programs(task.open(seed)[0], method_of(seed), finetuning_optimizer(task.steps))

    @cache
    def run(rate: float, seed: int) -> Cell:
        params = task.open(seed)[1]
        programs = programs_of(seed if entry.calibrates else 0)
        start = programs.start(method_of(seed), params, rate, seed)
        trained = train(programs, start, task.batches(seed), task.steps)
        held_out = programs.evaluate(trained.state, task.held_out())
        if trained.diverged or not math.isfinite(held_out["loss"]):
            return {"held_out": [math.inf, math.inf], "score": None, "after": None}
        return {
            "held_out": [-held_out["accuracy"] if task.score == "accuracy" else 0.0, held_out["loss"]],
            "score": programs.evaluate(trained.state, task.test())[task.score],
            "after": None if entry.own_classifier else loss_before(task, programs, trained.state),
        }

    def tuned(rate: float, seed: int) -> Cell:
        found = run(rate, seed)
        tried[rate] = found["held_out"]
        return found

    rate = best_rate(tuned, task.rates, task.wider)
    runs = [run(rate, seed) for seed in range(seeds)]
    if any(found["score"] is None for found in runs):
        return {"reason": f"it diverges at the rate {rate:g}", "commit": commit()}
    after = [found["after"] for found in runs]
    start = None if None in after else base_loss(task)
    return {
        "rate": rate,
        "tried": {f"{one:g}": _said(tried[one], task) for one in sorted(tried)},
        "score": [found["score"] for found in runs],
        "forgetting": None if start is None else [loss - start for loss in after],
        "seconds": round(time.perf_counter() - started, 1),
        "jax": jax.__version__,
        "commit": commit(),
    }


def _said(held_out: list[float], task: Task) -> float | None:
    """A held-out score; None of a run that diverged."""
    accuracy, loss = held_out
    found = -accuracy if task.score == "accuracy" else loss
    return found if math.isfinite(found) else None


def time_cell(task: Task, entry: Entry, rounds: int) -> Cell:
    """The ratios of a step's time to LoRA's, one of each in turn."""
    lora = entry_of(LORA, task.rank, task.steps, *task.open(0), task.width)
    calls = {name: _steps(task, one) for name, one in (("lora", lora), ("own", entry))}
    seconds = measure_in_turn(calls, rounds)
    return {"ratios": [own / base for own, base in zip(seconds["own"], seconds["lora"])], "commit": commit()}


@cache
def base_loss(task: Task) -> float | None:
    """The base's loss on what it was trained on, before it is adapted."""
    if task.before is None:
        return None
    model, params = task.open(0)
    programs = make_programs(model, pj.full(), finetuning_optimizer(1))
    return loss_before(task, programs, programs.start(pj.full(), params, 1.0, 0))


def loss_before(task: Task, programs: Programs, state: TrainingState) -> float | None:
    """The loss on what the base was trained on, under its own classifier; None where that has no place."""
    if task.before is None:
        return None
    trainable = state.trainable
    if task.before.classifier is not None:
        old = {f"head/classifier/{name}": leaf for name, leaf in task.before.classifier().items()}
        places = {
            path: leaf
            for path in tree.named_leaves(trainable)
            for name, leaf in old.items()
            if path == name or path.endswith(f"/{name}")
        }
        leaves = tree.named_leaves(trainable)
        if len(places) != len(old) or any(leaves[path].shape != leaf.shape for path, leaf in places.items()):
            return None
        trainable = tree.replace(trainable, {path: jnp.copy(leaf) for path, leaf in places.items()})
    return programs.evaluate(dataclasses.replace(state, trainable=trainable), task.before.batches())["loss"]


def _method(task: Task, entry: Entry, seed: int) -> pj.Transform:
    model, params = task.open(seed)
    setting = calibrated(task.steps, model, params, lambda: itertools.islice(task.batches(seed), CALIBRATION))
    return make_method(entry.contender, setting, model, params)


def _steps(task: Task, entry: Entry) -> Call:
    method, (model, params), batches = _method(task, entry, 0), task.open(0), task.batches(0)
    programs = make_programs(model, method, finetuning_optimizer(task.steps))
    start = programs.start(method, params, 1e-3, 0)
    return repeated(lambda state: programs.step(state, next(batches))[0], start)


def cells(seeds: int, rounds: int, target: str) -> dict[Column, Callable[[Task, Entry], Cell]]:
    """What measures each column."""
    return {
        "plan": lambda task, entry: plan_cell(task, entry, target),
        "disk": disk_cell,
        "score": lambda task, entry: score_cell(task, entry, seeds),
        "time": lambda task, entry: time_cell(task, entry, rounds),
    }


def measured(make: Callable[[Task, Entry], Cell], task: Task, entry: Entry) -> Cell:
    """The cell, or the reason why there is none."""
    try:
        return make(task, entry)
    except PeftError as error:
        return {"reason": str(error), "commit": commit()}
