"""Results as Markdown: what a report is, and the tables that several experiments have.

A line of a comparison of accuracies is a dictionary: `label`, `matched`, `trained` (parameters without the
classifier's), `rate` (the learning rate chosen), `accuracy` (one for each seed) and `step_seconds` (None
where it was not measured). All lines have the same seeds, so that two lines can be compared seed by seed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.record import write_json
from peftjax.io.files import read_json

Line = dict[str, Any]
Results = dict[str, Any]
NAME = "results"
"""Of the files of a folder: results.json, results.md and results.png."""


@dataclasses.dataclass(frozen=True)
class Report:
    """How the results of a folder are told; all of it is made from results.json alone.

    Attributes:
        text: what was compared and how, and the tables, in Markdown.
        draw: the plot.
        answer: the few numbers that answer the question, by name.
        levels: of results.json whose entries have a line each.
    """

    text: Callable[[Results], str]
    draw: Callable[[Results, Path], None]
    answer: Callable[[Results], dict[str, str]]
    levels: int = 2


def read_results(folder: Path) -> Results:
    """The results in a folder.

    Raises:
        PeftError: there are none.
    """
    return read_json(folder / f"{NAME}.json")


def write_report(folder: Path, report: Report, results: Results) -> str:
    """Write results.json, results.md and results.png; return the text."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{NAME}.json", results, report.levels)
    text = report.text(results)
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    report.draw(results, folder / f"{NAME}.png")
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def accuracy_table(lines: Sequence[Line]) -> str:
    """The lines in Markdown, each beside the first of the matched ones."""
    first = next(line for line in lines if line["matched"])
    rows = [
        [
            line["label"],
            f"{line['trained']:,}",
            f"{line['rate']:g}",
            percent(line["accuracy"]),
            "" if line is first else difference(line["accuracy"], first["accuracy"]),
            "" if line["step_seconds"] is None else f"{1000 * line['step_seconds']:.1f}",
        ]
        for line in lines
    ]
    header = ["method", "trained", "learning rate", "accuracy", f"minus {first['label']}", "ms a step"]
    return "\n".join(table(header, rows)) + "\n"


def best_accuracies(results: Results, count: int = 5) -> dict[str, str]:
    """The lines with the best mean accuracy, and that of the first matched line."""
    lines = sorted(results["lines"], key=lambda line: -statistics.mean(line["accuracy"]))
    first = next(line for line in results["lines"] if line["matched"])
    chosen = [line for place, line in enumerate(lines) if place < count or line is first]
    return {line["label"]: f"{percent(line['accuracy'])} %" for line in chosen}


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation(values):.1f}"


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean of the differences seed by seed and its standard error, in points."""
    pairs = [100 * (a - b) for a, b in zip(values, others, strict=True)]
    return f"{statistics.mean(pairs):+.1f} ± {deviation(pairs) / math.sqrt(len(pairs)):.1f}"


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ratio_rows(seconds: Mapping[str, Sequence[float]], base: str) -> list[tuple[str, float, str]]:
    """Of timings in turn: label, median in ms, and how many times the base's (median [range] of rounds)."""
    rows = []
    for label, taken in seconds.items():
        ratios = [one / of_base for one, of_base in zip(taken, seconds[base])]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        rows.append((label, 1000 * statistics.median(taken), spread))
    return rows
