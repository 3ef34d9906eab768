"""What was measured of new projections as tables and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.harness.plot import saved
from experiments.harness.report import Report, Results, deviation, ratio_rows, table

STEP = "a step"


def make_report(results: Results) -> str:
    """All tables in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    measured = f"{versions}, commit {results['commit']}"
    lines = [
        f"Measured on one CPU core with {measured}. Subspace iterations have {results['oversampling']} rows "
        "more than the rank.",
        "",
        "## A basis of one random matrix, a quarter of its smaller side; ms, median of the rounds",
        "",
        *_basis_table(results["bases"]),
        "",
        "## A refresh of the small Llama beside a step; one of each in turn",
        "",
        *_refresh_table(results["refreshes"]),
        "",
        f"## Share of the gradient that a basis of rank {results['rank']} keeps, mean over all matrices",
        "",
        "Of the batch that the basis is made from / of the next batch, at steps of a run of AdamW. The start "
        "before is the singular value decomposition's at the step before in the table.",
        "",
        *_energy_table(results["energy"]),
        "",
        f"## Test loss of GaLore, learning rate {results['rate']:g}",
        "",
        *_loss_table(results["losses"]),
        "",
    ]
    return "\n".join(lines)


def _basis_table(bases: dict[str, dict[str, list[float]]]) -> list[str]:
    labels = list(next(iter(bases.values())))
    rows = [
        [shape, *(f"{1000 * statistics.median(found[label]):.1f}" for label in labels)]
        for shape, found in bases.items()
    ]
    return table(["", *labels], rows)


def _refresh_table(seconds: dict[str, list[float]]) -> list[str]:
    rows = [(label, f"{ms:.0f}", spread) for label, ms, spread in ratio_rows(seconds, STEP)]
    return table(["", "ms", "/ step"], rows)


def _energy_table(energy: dict[str, dict[str, list[float]]]) -> list[str]:
    steps = max((entry["steps"] for entry in energy.values()), key=len)
    rows = []
    for label, entry in energy.items():
        shares = {step: pair for step, *pair in zip(entry["steps"], entry["same"], entry["next"])}
        cells = [" / ".join(f"{share:.3f}" for share in shares.get(step, ())) for step in steps]
        rows.append([label, *cells])
    return table(["", *(f"step {step}" for step in steps)], rows)


def _loss_table(losses: dict[str, Sequence[float | None]]) -> list[str]:
    first = next(iter(losses))
    rows = []
    for label, found in losses.items():
        if None in found or None in losses[first]:
            rows.append([label, "diverged", ""])
            continue
        pairs = [a - b for a, b in zip(found, losses[first], strict=True)]
        against = "" if label == first else f"{statistics.mean(pairs):+.4f}"
        mean = f"{statistics.mean(found):.4f}"
        if len(found) > 1:
            mean += f" ± {deviation(found):.4f}"
            against += f" ± {deviation(pairs) / len(pairs) ** 0.5:.4f}" if against else ""
        rows.append([label, mean, against])
    return table(["", f"nats per byte, {len(losses[first])} seeds", f"minus {first}"], rows)


def draw(results: Results, file: Path) -> None:
    """Shares kept against the step, and the time of a basis against its size."""
    with saved(file, 2, size=(11, 4)) as (_, (left, right)):
        for number, (label, entry) in enumerate(results["energy"].items()):
            left.plot(entry["steps"], entry["same"], "o-", label=label, color=f"C{number}")
            left.plot(entry["steps"], entry["next"], "o--", color=f"C{number}", alpha=0.5)
        left.set_xlabel("step")
        left.set_ylabel("share kept, of the next batch dashed")
        left.legend(fontsize=7)
        for label in next(iter(results["bases"].values())):
            times = [1000 * statistics.median(found[label]) for found in results["bases"].values()]
            right.plot(list(results["bases"]), times, "o-", label=label)
        right.set_yscale("log")
        right.set_ylabel("ms a basis, one core")
        right.legend(fontsize=7)


def answer(results: Results) -> dict[str, str]:
    """The time of a refresh relative to a step."""
    return {label: f"{spread} steps" for label, _, spread in ratio_rows(results["refreshes"], STEP)[1:]}


REPORT = Report(make_report, draw, answer)
