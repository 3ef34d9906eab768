"""Sparse tuning of vision transformers, and the numbers of the papers of SNELL and SNELLA.

Everything but full fine-tuning also trains the head and the class token, as the papers do. Their numbers are
of PyTorch on a GPU, whose attention keeps its weights; here no attention weights are kept, so the comparison
is of ratios, not of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peftjax as pj
from experiments.harness.contenders import Contender
from experiments.harness.memory import Model, Plans, Table, memory_report, peaks
from experiments.harness.plot import KINDS, saved, stacked_bars
from experiments.harness.report import table
from experiments.step_memory.masked import masked
from experiments.step_memory.models import vision_models
from experiments.step_memory.naive import naive

PAPER_MB = {
    "LoRA-8": {"ViT-B/16": 1546, "ViT-L/16": 4325, "ViT-H/14": 9325},
    "SNELL-8": {"ViT-B/16": 1673, "ViT-L/16": 4519, "ViT-H/14": 9692},
    "masked": {"ViT-B/16": 2428, "ViT-L/16": 7522, "ViT-H/14": 16119},
}
"""Printed by SNELL (arXiv 2411.01800); "masked" is its number for GPS. SNELLA (arXiv 2510.24037) claims to
save 31.1 % to 39.9 %, which is what these numbers of SNELL save against GPS on B and on L and H."""
NAIVE = "SNELL-8 by autodiff"
MIB = 2**20


def beside_head(label: str, method: Callable[[], pj.Transform]) -> Contender:
    """A method, with plain training of the head and the class token."""
    return Contender(label, lambda setting: pj.chain(method(), pj.unfreeze(["classifier", "class_token"])))


CONTENDERS = (
    Contender("full", lambda setting: pj.full()),
    beside_head("LoRA-8", partial(pj.lora, rank=8)),
    beside_head("SNELL-8", partial(pj.snell, rank=8)),
    beside_head("SNELL-32", partial(pj.snell, rank=32)),
    beside_head("SNELLA-32", partial(pj.snella, rank=32, total_steps=10_000)),
    # The optimizer is without decay, which would move the entries that it does not train.
    beside_head("masked", masked),
    beside_head("PaCA-16", partial(pj.paca, rank=16)),
    beside_head("PaCA-16 in place", partial(pj.paca, rank=16, in_place=True)),
    beside_head("SHiRA-8", partial(pj.shira, rank=8)),
    beside_head("SHiRA-8 in place", partial(pj.shira, rank=8, in_place=True)),
    beside_head(NAIVE, lambda: naive(pj.snell(rank=8))),
)


def report(plans: Plans) -> str:
    """The plans in Markdown."""
    some = next(iter(next(iter(plans.values())).values()))
    lines = [
        f"One training step as compiled for {some['device']} by jax {some['jax']}: batch {some['batch']}, "
        "224 x 224, float32, AdamW, 1000 classes. MiB; the paper's numbers as printed.",
        "",
    ]
    kinds = (kind.replace("_", " ") for kind in KINDS)
    header = ["", *kinds, "peak", "peak / LoRA-8", "TFLOP", "trained", "paper, MB", "compiled in"]
    for model, rows in plans.items():
        shown = {row: plan for row, plan in rows.items() if row != NAIVE and "peak" in plan}
        cells = [_cells(model, row, plan, rows) for row, plan in shown.items()]
        lines += [f"## {model}", "", *table(header, cells), ""]
    lines += ["## Claims", "", *(f"- {claim}" for claim in claims(plans)), ""]
    for model, rows in plans.items():
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


def claims(plans: Plans) -> list[str]:
    """The papers' claims, each with what was measured."""
    saves = "saves what SNELLA claims against gradient-mask sparse tuning (31.1 % on B, 39.9 % on L and H)"
    found = []
    for row, base, claim in (
        ("SNELL-8", "LoRA-8", "is within 10 % of LoRA-8"),
        ("SNELL-32", "masked", saves),
        ("SNELLA-32", "masked", saves),
    ):
        changes = {
            model: rows[row]["peak"] / rows[base]["peak"] - 1
            for model, rows in plans.items()
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


def draw(plans: Plans, file: Path) -> None:
    """The peak of every row, by kind, with the papers' numbers as points."""
    with saved(file, len(plans), size=(5 * len(plans), 4)) as (_, axes):
        for axis, (model, rows) in zip(axes, plans.items()):
            names = [row for row, plan in rows.items() if row != NAIVE and "peak" in plan]
            stacked_bars(axis, {name: rows[name] for name in names}, MIB)
            printed = [(PAPER_MB[name][model], name) for name in names if model in PAPER_MB.get(name, {})]
            if printed:
                axis.plot(*zip(*printed), "k|", markersize=12, label="paper (PyTorch), MB")
            axis.set_title(model)
            axis.set_xlabel("MiB")
        axes[0].legend(fontsize=8)


def answer(plans: Plans) -> dict[str, str]:
    """The peaks of a few contenders on ViT-B/16."""
    chosen = ("full", "LoRA-8", "SNELL-8", "SNELLA-32", "masked", "PaCA-16", "SHiRA-8")
    return peaks(plans, "ViT-B/16", chosen)


REPORT = memory_report(report, draw, answer)


def make_table(models: tuple[Model, ...] | None = None) -> Table:
    """The contenders on given models, by default three sizes; autodiff of the formula on the first alone."""
    models = models or vision_models()

    def asked(model: Model, contender: Contender) -> bool:
        return contender.label != NAIVE or model.name == models[0].name

    return Table(models, CONTENDERS, REPORT, asked=asked)
