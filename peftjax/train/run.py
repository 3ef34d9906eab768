"""A whole fine-tuning run: the task's data and model, the method, training, adapter and summary."""

import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from peftjax.adapters.files import save_adapter
from peftjax.backbone.backbone import Backbone
from peftjax.cli.report import adapted_line
from peftjax.core import tree
from peftjax.io.files import replacing
from peftjax.losses import Batch, classification, mean
from peftjax.train.config import TrainConfig, plan_steps, validate, with_defaults
from peftjax.train.identity import run_identity
from peftjax.train.loop import fit
from peftjax.train.metrics import FILE as METRICS
from peftjax.train.metrics import read_metrics
from peftjax.train.options import RunOptions, longest_text, make_method, model_folder, needs_steps
from peftjax.train.step import make_evaluate
from peftjax.train.tasks import TASKS
from peftjax.train.tasks.find import find_task
from peftjax.train.usage import peak_memory
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import describe
from peftjax.transform.transform import Transform

ADAPTER = "adapter"
SUMMARY = "summary.json"
# Of the first batch, for the method's checks, which may keep what training does not.
CHECKED_ROWS = 2
# Options that change what is written or kept, and not the numbers of the run.
_NOT_IDENTITY = ("log_every", "keep_last", "keep_best", "save_every", "tensorboard")

Summary = dict[str, Any]


def run(options: RunOptions, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Fine-tune, and leave the adapter and a summary in the output folder.

    Args:
        options: what to train on what.
        say: called with a line about each stage.

    Returns:
        The contents of `summary.json`: the scores on the evaluation texts, counts of parameters, peak
        bytes of the process, real tokens (no padding) and counted labels per second of training; for
        classification the accuracies of the linear probe and of the majority class, for language the
        scores before training, and how many tokens were counted, filled up and cut.

    Raises:
        PeftError: an option, a file or the data cannot be used; earlier outputs stay as they were.
    """
    started = time.perf_counter()
    validate(options.training)
    if not needs_steps(options.tuning):
        make_method(options.tuning)  # an option that cannot be used is found before the data is read
    name = find_task(options)
    task = TASKS[name]
    config = with_defaults(options.training, name, longest_text(model_folder(options.base.model)))

    def method_for(examples: int) -> Transform:
        return make_method(options.tuning, plan_steps(config, examples).total)

    prepared = task.prepare(options, config, method_for, say)
    model, params, method = prepared.model, prepared.params, prepared.method
    frozen, trainable = method.init(jax.random.key(config.seed), params)
    total = tree.count(params)
    say(f"{method.name}: {tree.count(trainable):,} of {total:,} parameters are trained")
    say(adapted_line(method, params, frozen, trainable))
    identity = {
        **run_identity(describe(method), params),
        "data": prepared.data,
        "training": _training(config),
        **({"untied": True} if options.base.untie else {}),
    }
    # What is trained whole is a copy already: the one that was loaded is not needed any more.
    prepared = dataclasses.replace(prepared, params=None)
    del params

    forward = method.model(model)
    evaluate = make_evaluate(forward, method, classification)
    before: dict[str, float] = {}
    if prepared.evaluates_before:
        before = task.named_scores(evaluate(trainable, frozen, prepared.held_out()))
        say(f"before training: {', '.join(f'{score} {value:.4f}' for score, value in before.items())}")
    warn(method, model, frozen, trainable, prepared.training)
    result = fit(
        forward,
        method,
        frozen,
        trainable,
        prepared.training,
        prepared.held_out,
        config=config,
        steps=plan_steps(config, prepared.examples),
        key=jax.random.key(config.seed),
        directory=options.output,
        identity=identity,
        evaluate=evaluate,
    )
    frozen = result.frozen
    scores = task.named_scores(evaluate(result.trainable, frozen, prepared.held_out()))

    info = {
        "task": name,
        "model": options.base.model,
        "head": model.head_name,
        "max_length": config.max_length,
        **({} if options.base.vocab_size is None else {"vocab_size": options.base.vocab_size}),
        **({"untied": True} if options.base.untie else {}),
        **prepared.info,
    }
    adapter = options.output / ADAPTER
    save_adapter(adapter, method, frozen, result.trainable, seed=config.seed, info=info)
    summary: Summary = {
        "task": name,
        "data": prepared.data["name"],
        "model": options.base.model,
        "method": describe(method),
        **scores,
        **{f"{score}_before": value for score, value in before.items()},
        **prepared.summary,
        "trainable_parameters": tree.count(trainable),
        "total_parameters": total,
        **peak_memory(),
        **_rates(options.output / METRICS),
        "steps": result.step,
        "best_step": result.best.step,
        "seconds": time.perf_counter() - started,
        "adapter": str(adapter),
    }
    with replacing(options.output / SUMMARY) as (file,):
        file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def warn(method: Transform, model: Backbone, frozen: Frozen, trainable: Trainable, batches: Any) -> None:
    """Warn of what the method's own checks find on the first rows of the next training batch."""
    if not method.checks:
        return
    state = batches.get_state()
    rows = {name: values[:CHECKED_ROWS] for name, values in next(batches).items()}
    batches.set_state(state)

    def loss(outputs: Any, batch: Batch) -> jax.Array:
        sums, weight = classification(outputs, batch)
        return mean(sums["loss"], weight)

    for check in method.checks:
        found = check(method, model, frozen, trainable, rows, loss)
        if found is not None:
            warnings.warn(found, stacklevel=2)


def _training(config: TrainConfig) -> dict[str, Any]:
    """The options that decide a run's numbers beside method, model and data."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IDENTITY}


def _rates(metrics: Path) -> Mapping[str, float | None]:
    """The median rates over the lines of the metrics file."""
    lines = read_metrics(metrics)
    found = {}
    for name in ("tokens_per_second", "labels_per_second"):
        rates = [rate for line in lines if (rate := getattr(line, name))]
        found[name] = statistics.median(rates) if rates else None
    return found
