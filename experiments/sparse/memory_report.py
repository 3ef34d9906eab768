"""The measured memory as tables, sentences and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.bars import KINDS, stacked_bars
from experiments.markdown import table

Results = dict[str, dict[str, dict[str, Any]]]
"""A plan by model and row."""

PAPER_MB = {
    "LoRA-8": {"ViT-B/16": 1546, "ViT-L/16": 4325, "ViT-H/14": 9325},
    "SNELL-8": {"ViT-B/16": 1673, "ViT-L/16": 4519, "ViT-H/14": 9692},
    "masked": {"ViT-B/16": 2428, "ViT-L/16": 7522, "ViT-H/14": 16119},
}
"""Printed by SNELL (arXiv 2411.01800); "masked" is its number for GPS. SNELLA (arXiv 2510.24037) claims to
save 31.1 % to 39.9 %, which is what these numbers of SNELL save against GPS on B and on L and H."""
NAIVE = "SNELL-8 by autodiff"
MIB = 2**20


def report(results: Results) -> str:
    """The results in Markdown."""
    some = next(iter(next(iter(results.values())).values()))
    lines = [
        f"One training step as compiled for {some['device']} by jax {some['jax']}: batch {some['batch']}, "
        f"224 x 224, float32, AdamW, {some['classes']} classes. MiB; the paper's numbers as printed.",
        "",
    ]
    kinds = (kind.replace("_", " ") for kind in KINDS)
    header = ["", *kinds, "peak", "peak / LoRA-8", "TFLOP", "trained", "paper, MB", "compiled in"]
    for model, rows in results.items():
        cells = [_cells(model, row, plan, rows) for row, plan in rows.items() if row != NAIVE]
        lines += [f"## {model}", "", *table(header, cells), ""]
    lines += ["## Claims", "", *(f"- {claim}" for claim in claims(results)), ""]
    for model, rows in results.items():
        if {NAIVE, "SNELL-8"} <= rows.keys():
            lines += [f"## SNELL-8 of {model} with and without its closed form", "", *_naive(rows), ""]
    return "\n".join(lines)


def _cells(model: str, row: str, plan: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    mib = [f"{plan['bytes'][kind] / MIB:,.1f}" for kind in KINDS]
    ratio = f"{plan['peak'] / rows['LoRA-8']['peak']:.3f}" if "LoRA-8" in rows else ""
    paper = PAPER_MB.get(row, {}).get(model, "")
    left_out = f" ({'; '.join(plan['uncounted'])})" if plan["uncounted"] else ""
    flops = f"{plan['flops'] / 1e12:.3f}{left_out}"
    trained = f"{plan['trainable_parameters']:,}"
    peak, seconds = f"{plan['peak'] / MIB:,.1f}", f"{plan['compile_seconds']:.0f} s"
    return [row, *mib, peak, ratio, flops, trained, str(paper), seconds]


def claims(results: Results) -> list[str]:
    """The papers' claims, each with what was measured."""
    saved = "saves what SNELLA claims against gradient-mask sparse tuning (31.1 % on B, 39.9 % on L and H)"
    found = []
    for row, base, claim in (
        ("SNELL-8", "LoRA-8", "is within 10 % of LoRA-8"),
        ("SNELL-32", "masked", saved),
        ("SNELLA-32", "masked", saved),
    ):
        changes = {
            model: rows[row]["peak"] / rows[base]["peak"] - 1
            for model, rows in results.items()
            if {row, base} <= rows.keys()
        }
        if changes:
            holds = all(change <= _bound(model, base) for model, change in changes.items())
            measured = ", ".join(f"{model} {change:+.1%}" for model, change in changes.items())
            found.append(f"{row} {claim}: {'confirmed' if holds else 'not confirmed'} ({measured}).")
    return found


def _bound(model: str, base: str) -> float:
    """The largest change of the peak at which a claim holds; the papers' own where they compare with GPS."""
    return 0.1 if base == "LoRA-8" else round(PAPER_MB["SNELL-8"][model] / PAPER_MB[base][model] - 1, 3)


def _naive(rows: dict[str, dict[str, Any]]) -> list[str]:
    closed = rows["SNELL-8"]["bytes"]["temporaries"]
    cells = []
    for name, row in (("closed form", "SNELL-8"), ("autodiff of the formula", NAIVE)):
        size = rows[row]["bytes"]["temporaries"]
        cells.append([name, f"{size / MIB:,.1f}", f"{rows[row]['peak'] / MIB:,.1f}", f"{size / closed:.2f}"])
    return table(["", "temporaries", "peak", "temporaries / closed form"], cells)


def plot(results: Results, file: Path) -> None:
    """The peak of every row, by kind, with the papers' numbers as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False
    )
    for axis, (model, rows) in zip(axes[0], results.items()):
        names = [row for row in rows if row != NAIVE]
        stacked_bars(axis, {name: rows[name] for name in names}, MIB)
        printed = [(PAPER_MB[name][model], name) for name in names if model in PAPER_MB.get(name, {})]
        if printed:
            axis.plot(*zip(*printed), "k|", markersize=12, label="paper (PyTorch), MB")
        axis.set_title(model)
        axis.set_xlabel("MiB")
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
