"""The table of all methods on one task, its plot, and the few numbers that answer the question."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.harness.plot import saved
from experiments.harness.report import Report, Results, deviation, table
from experiments.methods.entries import LORA

Row = dict[str, Any]
NOT_MEASURED = "not measured"
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Standard errors that 95 % of differences lie within, by the number of seeds: Student's t."""
HEADER = (
    "method", "options", "trained", "on disk, kB", "backward keeps, kB", "/ LoRA", "peak, kB", "/ LoRA",
    "MFLOP a step", "/ LoRA", "step time / LoRA", "learning rate", "score", "minus LoRA", "forgetting",
)  # fmt: skip


def report(results: Results) -> str:
    """What was compared and how, the table, and what can be told apart."""
    settings, rows = results["settings"], results["rows"]
    scored, accuracy = _scored(rows), settings["score"] == "accuracy"
    unit = (
        "accuracy in % of the test part"
        if accuracy
        else "loss of the test part, nats a byte (lower is better)"
    )
    about = (
        settings["about"],
        f"A method has the size, by the first of the options {', '.join(settings['sizes'])} that it has, "
        f"with which it trains nearest to LoRA of rank {settings['rank']}; what trains the rest of the model "
        "too has a quarter of the width as its rank; what trains nothing goes beside that LoRA. Other "
        "options are at their defaults but for those named. Trained numbers are without the classifier's, "
        "which all train; files are those of `save_adapter`, with it.",
        f"What backward keeps, the peak and the FLOPs are of one AdamW step as traced and compiled for "
        f"{settings['target']}. The step time is the median of paired ratios within one run.",
        f"Score: {unit}, mean and standard deviation of {settings['seeds']} seeds; differences seed by seed, "
        "mean and standard error. The learning rate is the one that is best on held-out data with seed 0 (of "
        f"equal accuracies the lower loss), out of {', '.join(f'{rate:g}' for rate in settings['rates'])} "
        "and further ones where the best is the first or last.",
    )
    lines = [" ".join(about), ""]
    lines += table(HEADER, [_cells(name, row, rows, accuracy) for name, row in rows.items()])
    return "\n".join([*lines, "", *apart(scored, accuracy), ""])


def apart(scored: Mapping[str, list[float]], accuracy: bool) -> list[str]:
    """Which methods are told apart from LoRA, and the best ones from each other."""
    if LORA not in scored:
        return ["No score was measured: nothing is said of which method is better."]
    seeds = len(scored[LORA])
    told = {name: difference_of(own, scored[LORA]) for name, own in scored.items() if name != LORA}
    better, worse, neither = [], [], []
    for name, (mean, error) in told.items():
        clear = seeds in T95 and abs(mean) > T95[seeds] * error
        up = (mean > 0) == accuracy
        (neither if not clear else better if up else worse).append(name)
    return [
        f"Told apart from LoRA by {seeds} seeds (a difference of more than {T95.get(seeds, math.inf):g} "
        "standard errors, which one method in twenty has by chance): better "
        f"{_listed(better)}; worse {_listed(worse)}. All others ({len(neither)}) are not told apart from "
        f"LoRA: {_listed(neither)}.",
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def difference_of(values: list[float], others: list[float]) -> tuple[float, float]:
    """The mean of the differences seed by seed, and its standard error."""
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    return statistics.mean(pairs), deviation(pairs) / math.sqrt(len(pairs))


def _scored(rows: Mapping[str, Row]) -> dict[str, list[float]]:
    return {name: row["score"]["score"] for name, row in rows.items() if "score" in row.get("score", {})}


def _cells(name: str, row: Row, rows: Mapping[str, Row], accuracy: bool) -> list[str]:
    if "reason" in row:
        return [name, f"not here: {row['reason']}", *[""] * (len(HEADER) - 2)]
    plan, disk, score, time = (row.get(part, {}) for part in ("plan", "disk", "score", "time"))
    lora = rows.get(LORA, {})
    base = lora.get("plan", {})
    factor, digits = (100, 1) if accuracy else (1, 4)

    def said(cell: Row, key: str, text: Callable[[Any], str]) -> str:
        if "reason" in cell:
            return f"not here: {cell['reason']}"
        return text(cell[key]) if key in cell else NOT_MEASURED

    def ratio(key: str) -> str:
        return f"{plan[key] / base[key]:.2f}" if key in plan and key in base else ""

    def spread(values: list[float], scale: float) -> str:
        return f"{scale * statistics.mean(values):.{digits}f} ± {scale * deviation(values):.{digits}f}"

    def minus(values: list[float]) -> str:
        if name == LORA or "score" not in lora.get("score", {}):
            return ""
        mean, error = difference_of(values, lora["score"]["score"])
        return f"{factor * mean:+.{digits}f} ± {factor * error:.{digits}f}"

    def forgotten(values: list[float] | None) -> str:
        return "-" if values is None else f"{statistics.mean(values):+.3f} ± {deviation(values):.3f}"

    return [
        name,
        ", ".join(f"{option}={value}" for option, value in row["options"].items()),
        said(plan, "trained", lambda count: f"{count:,}"),
        said(disk, "bytes", lambda size: f"{size / 1e3:,.1f}"),
        *(
            cell
            for key, unit in (("kept", 1e3), ("peak", 1e3), ("flops", 1e6))
            for cell in (said(plan, key, lambda size, unit=unit: f"{size / unit:,.0f}"), ratio(key))
        ),
        said(time, "ratios", _spread_of_ratios),
        f"{score['rate']:g}" if "rate" in score else "",
        said(score, "score", lambda values: spread(values, factor)),
        minus(score["score"]) if "score" in score else "",
        forgotten(score["forgetting"]) if "score" in score else "",
    ]


def _spread_of_ratios(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def draw(results: Results, file: Path) -> None:
    """Of every method: trained numbers, residuals and peak beside LoRA's, score and forgetting."""
    rows = {name: row for name, row in results["rows"].items() if "trained" in row.get("plan", {})}
    rows |= {name: row for name, row in results["rows"].items() if "score" in row.get("score", {})}
    names = list(rows)
    base = results["rows"].get(LORA, {}).get("plan", {})
    factor = 100 if results["settings"]["score"] == "accuracy" else 1
    with saved(file, 4, size=(14, 1.5 + 0.17 * len(names)), sharey=True) as (_, axes):
        for place, name in enumerate(names):
            plan, score = rows[name].get("plan", {}), rows[name].get("score", {})
            color = "#c8553d" if name == LORA else "#1b6ca8"
            if "trained" in plan:
                axes[0].scatter(max(plan["trained"], 1), place, s=14, color=color)
            for key, marker in (("kept", "o"), ("peak", "|")):
                if key in plan and key in base:
                    axes[1].scatter(plan[key] / base[key], place, s=18, color=color, marker=marker)
            for axis, key, scale in ((axes[2], "score", factor), (axes[3], "forgetting", 1)):
                if score.get(key):
                    values = [scale * value for value in score[key]]
                    axis.errorbar(
                        statistics.mean(values), place, xerr=deviation(values), fmt="o", ms=4, color=color
                    )
        axes[0].set_yticks(range(len(names)), names, fontsize=7)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        axes[0].set_xscale("log")
        axes[1].set_xscale("log")
        titles = ("trained numbers", "kept (dots) and peak (bars) / LoRA", "score", "forgetting")
        for axis, title in zip(axes, titles):
            axis.set_xlabel(title)
            axis.grid(alpha=0.3)


def answer(results: Results, count: int = 3) -> dict[str, str]:
    """The methods that keep least, and those with the best scores beside LoRA's."""
    rows, accuracy = results["rows"], results["settings"]["score"] == "accuracy"
    found: dict[str, str] = {}
    plans = {name: row["plan"] for name, row in rows.items() if "kept" in row.get("plan", {})}
    if LORA in plans:
        for name in sorted(plans, key=lambda name: plans[name]["kept"])[:count]:
            found[f"{name} keeps"] = f"{plans[name]['kept'] / plans[LORA]['kept']:.2f} x LoRA"
    scored = _scored(rows)
    if LORA in scored:
        order = sorted(scored, key=lambda name: statistics.mean(scored[name]), reverse=accuracy)
        for name in dict.fromkeys([*order[:count], LORA]):
            mean, spread = statistics.mean(scored[name]), deviation(scored[name])
            found[name] = (
                f"{100 * mean:.1f} ± {100 * spread:.1f} %" if accuracy else f"{mean:.4f} ± {spread:.4f}"
            )
    return found


REPORT = Report(text=report, draw=draw, answer=answer)
