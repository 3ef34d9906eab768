"""The recorded runs as lines, a table and curves.

A line of the results is a dictionary: `label`, `beside_weights` (bytes), `rate` (the best learning rate),
`test` (the loss of the test part by seed), `tried` (the loss of the held-out part with seed 0 by learning
rate; None where a run diverged) and `curve` (`steps`, and over the seeds `mean`, `low` and `high` of the
held-out loss).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.harness.plot import saved
from experiments.harness.record import Run
from experiments.harness.report import Line, Report, Results, deviation, table


def read_lines(runs: Sequence[Run], labels: Sequence[str], seeds: int) -> list[Line]:
    """The methods with a run of every seed at one rate that did not diverge, in the given order."""
    lines = []
    for label in labels:
        of_label = [run for run in runs if run["label"] == label]
        first = sorted((run for run in of_label if run["seed"] == 0), key=lambda run: run["rate"])
        finite = [run for run in first if run["held_out"] is not None]
        if not finite:
            continue
        rate = min(finite, key=lambda run: run["held_out"])["rate"]
        chosen = sorted((run for run in of_label if run["rate"] == rate), key=lambda run: run["seed"])
        if len(chosen) == seeds and all(run["test"] is not None for run in chosen):
            lines.append(
                {
                    "label": label,
                    "beside_weights": chosen[0]["beside_weights"],
                    "rate": rate,
                    "test": [run["test"] for run in chosen],
                    "tried": {f"{run['rate']:g}": run["held_out"] for run in first},
                    "curve": _curve(chosen),
                }
            )
    return lines


def _curve(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The held-out loss against the step, over the seeds."""
    losses = list(zip(*([loss for _, loss in run["curve"]] for run in runs), strict=True))
    return {
        "steps": [step for step, _ in runs[0]["curve"]],
        "mean": [statistics.mean(column) for column in losses],
        "low": [min(column) for column in losses],
        "high": [max(column) for column in losses],
    }


def loss_table(lines: Sequence[Line]) -> str:
    """The lines in Markdown, in the order of their mean test loss, each beside the first one."""
    base = lines[0]
    rows = []
    for line in sorted(lines, key=lambda line: statistics.mean(line["test"])):
        pairs = [loss - of_base for loss, of_base in zip(line["test"], base["test"], strict=True)]
        error = deviation(pairs) / len(pairs) ** 0.5
        tried = ", ".join(
            f"{rate}: {'diverged' if loss is None else f'{loss:.3f}'}" for rate, loss in line["tried"].items()
        )
        rows.append(
            [
                line["label"],
                f"{line['beside_weights'] / 1000:,.0f}",
                f"{line['rate']:g}",
                _spread(line["test"]),
                "" if line is base else f"{statistics.mean(pairs):+.4f} ± {error:.4f}",
                tried,
            ]
        )
    header = (
        "method",
        "kB beside the weights",
        "learning rate",
        "test loss",
        f"minus {base['label']}",
        "rates tried",
    )
    return "\n".join(table(header, rows)) + "\n"


def _spread(losses: Sequence[float]) -> str:
    return f"{statistics.mean(losses):.4f} ± {deviation(losses):.4f}"


def describe(settings: dict[str, Any], measured_with: dict[str, list[str]]) -> str:
    """What was compared, for above the table."""
    measured = [f"{name} {', '.join(found)}" for name, found in measured_with.items()]
    return (
        f"A Llama of {settings['layers']} layers, {settings['width']} wide, over the bytes of "
        f"{settings['data']}: {settings['steps']} steps of {settings['batch']} x {settings['length']} bytes, "
        f"rank {settings['rank']}, a new projection every {settings['every']} steps, scale "
        f"{settings['scale']:g}, {settings['seeds']} seeds. Loss in nats per byte of the test part, mean and "
        "standard deviation; differences seed by seed, mean and standard error. Beside the weights: all that "
        "a step is given less the batch and the model's own parameters, float32 (low-rank restarts hold "
        "factors instead of weights). Rates tried: loss of the held-out part with "
        f"seed 0, by which the rate was chosen. Measured on one CPU core with {'; '.join(measured)}."
    )


def summarize(settings: dict[str, Any], runs: Sequence[Run], labels: Sequence[str]) -> Results:
    """The results of finished runs."""
    measured_with = {name: sorted({run[name] for run in runs}) for name in ("jax", "optax", "commit")}
    lines = read_lines(runs, labels, settings["seeds"])
    return {"settings": settings, "measured_with": measured_with, "lines": lines}


def report(results: Results) -> str:
    """What was compared, and the table of what is complete."""
    if not results["lines"]:
        return "No method has all its runs yet.\n"
    return f"{describe(results['settings'], results['measured_with'])}\n\n{loss_table(results['lines'])}"


def draw(results: Results, file: Path) -> None:
    """The mean over the seeds, and a band from the lowest to the highest; the second plot is the end."""
    lines = sorted(results["lines"], key=lambda line: statistics.mean(line["test"]))
    if not lines:
        return
    import matplotlib

    colors = matplotlib.colormaps["tab20"].colors
    with saved(file, 2, size=(12, 5)) as (_, axes):
        for place, line in enumerate(lines):
            curve, color = line["curve"], colors[place % len(colors)]
            for axis in axes:
                axis.plot(curve["steps"], curve["mean"], label=line["label"], color=color)
                axis.fill_between(curve["steps"], curve["low"], curve["high"], alpha=0.2, color=color)
        last = lines[0]["curve"]["steps"][-1]
        ends = [
            (low, high)
            for curve in (line["curve"] for line in lines)
            for step, low, high in zip(curve["steps"], curve["low"], curve["high"])
            if step >= last / 2
        ]
        axes[0].set_ylabel("held-out loss, nats per byte")
        axes[1].set_xlim(last / 2, last)
        axes[1].set_ylim(min(low for low, _ in ends) - 0.02, max(high for _, high in ends) + 0.02)
        for axis in axes:
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        axes[1].legend(fontsize=8)


def answer(results: Results, count: int = 4) -> dict[str, str]:
    """The lines with the lowest mean test loss, and the first line."""
    lines = sorted(results["lines"], key=lambda line: statistics.mean(line["test"]))
    first = results["lines"][:1]
    chosen = [line for place, line in enumerate(lines) if place < count or line in first]
    return {line["label"]: f"{_spread(line['test'])} nats per byte" for line in chosen}


REPORT = Report(report, draw, answer)
