"""What was measured of new projections as tables and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.markdown import table
from experiments.tuning.report import deviation, write_json

STEP = "a step"


def make_report(results: dict[str, Any]) -> str:
    """All tables in Markdown."""
    measured = f"jax {results['jax']}, optax {results['optax']}, commit {results['commit']}"
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
    rows = []
    for label, taken in seconds.items():
        ratios = [own / step for own, step in zip(taken, seconds[STEP])]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        rows.append([label, f"{1000 * statistics.median(taken):.0f}", spread])
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
    for label, own in losses.items():
        if None in own or None in losses[first]:
            rows.append([label, "diverged", ""])
            continue
        pairs = [a - b for a, b in zip(own, losses[first], strict=True)]
        against = "" if label == first else f"{statistics.mean(pairs):+.4f}"
        mean = f"{statistics.mean(own):.4f}"
        if len(own) > 1:
            mean += f" ± {deviation(own):.4f}"
            against += f" ± {deviation(pairs) / len(pairs) ** 0.5:.4f}" if against else ""
        rows.append([label, mean, against])
    return table(["", f"nats per byte, {len(losses[first])} seeds", f"minus {first}"], rows)


def write_report(folder: Path, results: dict[str, Any]) -> str:
    """Write refresh.json, refresh.md and refresh.png; return the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    text = make_report(results)
    write_json(folder / "refresh.json", results)
    (folder / "refresh.md").write_text(text)
    draw(results, folder / "refresh.png")
    return text


def draw(results: dict[str, Any], file: Path) -> None:
    """Shares kept against the step, and the time of a basis against its size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
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
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
