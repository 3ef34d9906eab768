"""The results of a comparison as JSON, a table and a plot.

A line of the results is a dictionary: `label`, `matched`, `trained` (parameters without the classifier's),
`rate` (the learning rate chosen), `accuracy` (one for each seed) and `step_seconds` (None where it was not
measured). All lines have the same seeds, so that two lines can be compared seed by seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftjax.io.files import replacing

Line = dict[str, Any]


def write_report(folder: Path, about: str, results: dict[str, Any]) -> str:
    """Write results.json, results.md and results.png; return the table.

    Args:
        folder: where to; made if need be.
        about: what was compared and how, above the table.
        results: settings, and the `lines`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = f"{about}\n\n{make_table(results['lines'])}"
    write_json(folder / "results.json", results)
    (folder / "results.md").write_text(table)
    draw_plot(results["lines"], folder / "results.png")
    return table


def write_json(file: Path, results: dict[str, Any]) -> None:
    """Replace the file as a whole, so that a stopped run leaves the earlier one."""
    with replacing(file) as (new,):
        new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def make_table(lines: Sequence[Line]) -> str:
    """The lines in Markdown, each beside the first of the matched ones."""
    first = next(line for line in lines if line["matched"])
    rows = [
        f"| method | trained | learning rate | accuracy | minus {first['label']} | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        against = "" if line is first else difference(line["accuracy"], first["accuracy"])
        rows.append(
            f"| {line['label']} | {line['trained']:,} | {line['rate']:g} "
            f"| {100 * statistics.mean(line['accuracy']):.1f} ± {100 * deviation(line['accuracy']):.1f} "
            f"| {against} | {_milliseconds(line['step_seconds'])} |"
        )
    return "\n".join(rows) + "\n"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def difference(own: Sequence[float], others: Sequence[float]) -> str:
    """The mean of the differences seed by seed and its standard error, in points."""
    pairs = [100 * (a - b) for a, b in zip(own, others, strict=True)]
    return f"{statistics.mean(pairs):+.1f} ± {deviation(pairs) / math.sqrt(len(pairs)):.1f}"


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw_plot(lines: Sequence[Line], file: Path) -> None:
    """Every seed's accuracy as a small dot, the mean with its standard deviation as a large one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 0.8 + 0.32 * len(lines)), layout="constrained")
    for place, line in enumerate(lines):
        color = "#1b6ca8" if line["matched"] else "#8a8a8a"
        scores = [100 * score for score in line["accuracy"]]
        axis.scatter(scores, [place] * len(scores), s=12, color=color, alpha=0.4, linewidths=0)
        axis.errorbar(statistics.mean(scores), place, xerr=deviation(scores), fmt="o", color=color, capsize=3)
    axis.set_yticks(range(len(lines)), [f"{line['label']} ({line['trained']:,})" for line in lines])
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy, %: seeds, mean and standard deviation")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
