"""The recorded runs as a table, and the curves as a plot."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.markdown import table
from experiments.tuning.record import Record, Run
from experiments.tuning.report import deviation, write_json


@dataclasses.dataclass(frozen=True)
class Line:
    """One method's runs.

    Attributes:
        label: its name.
        beside: bytes beside the weights.
        rate: the best learning rate.
        runs: those at it, by seed.
        tried: the loss of the held-out part with seed 0 by learning rate; None where a run diverged.
    """

    label: str
    beside: int
    rate: float
    runs: tuple[Run, ...]
    tried: dict[float, float | None]

    @property
    def losses(self) -> list[float]:
        """Of the test part, by seed."""
        return [run["test"] for run in self.runs]


def read_lines(runs: Sequence[Run], labels: Sequence[str], seeds: int) -> list[Line]:
    """The methods with a run of every seed at one rate that did not diverge, in the given order."""
    lines = []
    for label in labels:
        own = [run for run in runs if run["label"] == label]
        first = sorted((run for run in own if run["seed"] == 0), key=lambda run: run["rate"])
        finite = [run for run in first if run["held_out"] is not None]
        if not finite:
            continue
        rate = min(finite, key=lambda run: run["held_out"])["rate"]
        chosen = sorted((run for run in own if run["rate"] == rate), key=lambda run: run["seed"])
        if len(chosen) == seeds and all(run["test"] is not None for run in chosen):
            tried = {run["rate"]: run["held_out"] for run in first}
            lines.append(Line(label, chosen[0]["beside_weights"], rate, tuple(chosen), tried))
    return lines


def make_table(lines: Sequence[Line]) -> str:
    """The lines in Markdown, in the order of their mean test loss, each beside the first one."""
    base = lines[0]
    rows = []
    for line in sorted(lines, key=lambda line: statistics.mean(line.losses)):
        pairs = [own - of_base for own, of_base in zip(line.losses, base.losses, strict=True)]
        error = deviation(pairs) / len(pairs) ** 0.5
        tried = ", ".join(
            f"{rate:g}: {'diverged' if loss is None else f'{loss:.3f}'}" for rate, loss in line.tried.items()
        )
        rows.append(
            [
                line.label,
                f"{line.beside / 1000:,.0f}",
                f"{line.rate:g}",
                f"{statistics.mean(line.losses):.4f} ± {deviation(line.losses):.4f}",
                "" if line is base else f"{statistics.mean(pairs):+.4f} ± {error:.4f}",
                tried,
            ]
        )
    header = (
        "method",
        "kB beside the weights",
        "learning rate",
        "test loss",
        f"minus {base.label}",
        "rates tried",
    )
    return "\n".join(table(header, rows)) + "\n"


def describe(settings: dict[str, Any], runs: Sequence[Run]) -> str:
    """What was compared, for above the table."""
    measured = [
        f"{name} {', '.join(sorted({run[name] for run in runs}))}" for name in ("jax", "optax", "commit")
    ]
    return (
        f"A Llama of {settings['layers']} layers, {settings['width']} wide, over the bytes of "
        f"{settings['data']}: {settings['steps']} steps of {settings['batch']} x {settings['length']} bytes, "
        f"rank {settings['rank']}, a new projection every {settings['every']} steps, scale "
        f"{settings['scale']:g}, {settings['seeds']} seeds. Loss in nats per byte of the test part, mean and "
        "standard deviation; differences seed by seed, mean and standard error. Beside the weights: all that "
        "a step is given less the batch and the model's own parameters, float32 (low-rank restarts hold "
        "factors in the place of weights). Rates tried: loss of the held-out part with "
        f"seed 0, by which the rate was chosen. Measured on one CPU core with {'; '.join(measured)}."
    )


def write_report(folder: Path, record: Record, labels: Sequence[str]) -> str:
    """Write results.json, results.md and results.png of what is complete; return the table."""
    lines = read_lines(record.runs, labels, record.settings["seeds"])
    if not lines:
        return "No method has all its runs yet.\n"
    text = f"{describe(dict(record.settings), record.runs)}\n\n{make_table(lines)}"
    (folder / "results.md").write_text(text)
    results = [
        {"label": line.label, "rate": line.rate, "beside_weights": line.beside, "test": line.losses}
        for line in lines
    ]
    write_json(folder / "results.json", {"settings": record.settings, "lines": results})
    draw_curves(lines, folder / "results.png")
    return text


def draw_curves(lines: Sequence[Line], file: Path) -> None:
    """The mean over the seeds, and a band from the lowest to the highest; the second plot is the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colors = pyplot.get_cmap("tab20").colors
    for place, line in enumerate(sorted(lines, key=lambda line: statistics.mean(line.losses))):
        steps = [step for step, _ in line.runs[0]["curve"]]
        losses = list(zip(*([loss for _, loss in run["curve"]] for run in line.runs), strict=True))
        means = [statistics.mean(column) for column in losses]
        for axis in axes:
            color = colors[place % len(colors)]
            axis.plot(steps, means, label=line.label, color=color)
            axis.fill_between(
                steps, *([pick(column) for column in losses] for pick in (min, max)), alpha=0.2, color=color
            )
    axes[0].set_ylabel("held-out loss, nats per byte")
    axes[1].set_xlim(steps[-1] / 2, steps[-1])
    tail = [
        loss for line in lines for run in line.runs for step, loss in run["curve"] if step >= steps[-1] / 2
    ]
    axes[1].set_ylim(min(tail) - 0.02, max(tail) + 0.02)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
