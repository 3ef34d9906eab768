"""The last step of a run: the adapter and the summary, in the output folder."""

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.adapters.files import save_adapter
from peftjax.core import tree
from peftjax.io.files import replacing
from peftjax.train.fine_tune import Result
from peftjax.train.metrics import FILE as METRICS
from peftjax.train.metrics import read_metrics
from peftjax.train.tasks.task import Run
from peftjax.train.throughput import peak_memory
from peftjax.transform.registry import describe

ADAPTER = "adapter"
SUMMARY = "summary.json"

Summary = dict[str, Any]


def write(run: Run, result: Result, *, started: float) -> Summary:
    """Write `adapter/` and `summary.json`, and return the contents of the latter.

    Args:
        run: from `resolve`.
        result: from `fine_tune`.
        started: `time.perf_counter()` when the run began.

    Raises:
        PeftError: a file cannot be written; earlier outputs stay as they were.
    """
    options, config, fitted = run.options, run.config, result.fitted
    info = {
        "task": run.task,
        "model": run.base.name,
        "head": result.head,
        "max_length": config.max_length,
        **({} if options.base.vocab_size is None else {"vocab_size": options.base.vocab_size}),
        **({"untied": True} if options.base.untie else {}),
        **run.data.info,
    }
    adapter = options.output / ADAPTER
    save_adapter(adapter, result.method, fitted.frozen, fitted.trainable, seed=config.seed, info=info)
    summary: Summary = {
        "task": run.task,
        "data": run.data.identity["name"],
        "model": run.base.name,
        "method": describe(result.method),
        **result.scores,
        **{f"{score}_before": value for score, value in result.before.items()},
        **result.started,
        **run.data.summary,
        "trainable_parameters": tree.count(fitted.trainable),
        "total_parameters": result.total_parameters,
        **peak_memory(),
        **_rates(options.output / METRICS),
        "steps": fitted.step,
        "best_step": fitted.best.step,
        "seconds": time.perf_counter() - started,
        "adapter": str(adapter),
    }
    with replacing(options.output / SUMMARY) as (file,):
        file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _rates(metrics: Path) -> Mapping[str, float | None]:
    """The median rates over the lines of the metrics file."""
    lines = read_metrics(metrics)
    found = {}
    for name in ("tokens_per_second", "labels_per_second"):
        rates = [rate for line in lines if (rate := getattr(line, name))]
        found[name] = statistics.median(rates) if rates else None
    return found
