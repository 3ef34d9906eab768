"""Models, methods and machines: what a device needs, what passes its links, and its rate at most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.harness.contenders import Contender
from experiments.harness.memory import Model, Plans, Table, memory_report
from experiments.harness.plot import saved
from experiments.harness.report import table
from experiments.plan import scaling
from experiments.plan.cells import METHODS, MODELS, NO_REMAT, PUBLISHED, TARGETS, on
from experiments.plan.scaling import collected

GIB = 2**30
CELLS = tuple(on(model, target) for model in MODELS for target in TARGETS)
OTHERS = tuple(model for model in scaling.CELLS if model.name not in {cell.name for cell in CELLS})
"""Of weak scaling alone."""
CONTENDERS = (*METHODS, NO_REMAT)
RATE, SOURCE = 12_473, "https://docs.nvidia.com/nemo/automodel/performance/performance-summary.md"
"""Tokens a second of LoRA r=16 on Llama-3-8B, 2 x 4,096 tokens, bfloat16, no remat, on one H100."""
HEADER = (
    "",
    "needs, GiB",
    "of",
    "fits",
    "collectives, GiB",
    "compute, s",
    "memory, s",
    "network, s",
    "tokens/s a device, at most",
    "compiled in, s",
)


def asked(model: Model, contender: Contender) -> bool:
    """Without remat only what a rate is published of, and that only so; of weak scaling one method."""
    if model in OTHERS:
        return scaling.asked(model, contender)
    return (contender is NO_REMAT) == (model is PUBLISHED)


def needs(cell: dict[str, Any]) -> float | None:
    """GiB of a device: the step with its program, or what is done between steps; None if not known."""
    if "peak" in cell:
        return max(cell["peak"] + cell["bytes"]["code"], *cell["between"], 0) / GIB
    return None if cell.get("needed") is None else cell["needed"] / GIB


def rate(cell: dict[str, Any]) -> float | None:
    """Tokens a second of a device, if a step took the roofline's time; None where this is not known."""
    bound = cell["roofline"]
    if bound is None:
        return None
    return cell["items"] / cell["devices"] / max(bound["compute"], bound["memory"], bound["network"])


def row(label: str, cell: dict[str, Any]) -> tuple[str, ...]:
    """A cell as a row."""
    needed = needs(cell)
    size = "" if needed is None else f"{needed:.2f}"
    if "peak" not in cell:
        capacity = cell.get("capacity")
        of = "" if capacity is None else f"{capacity / GIB:.2f}"
        return (label, size, of, "no" if "fits" in cell else "does not compile", *[""] * (len(HEADER) - 4))
    bound = cell["roofline"]
    times = ("", "", "", "", "")  # this jax cannot read what a newer compiler made
    if bound is not None:
        parts = (f"{bound[part]:.4f}" for part in ("compute", "memory", "network"))
        times = (f"{collected(cell):.2f}", *parts, f"{rate(cell):,.0f}")
    return (
        label,
        size,
        f"{cell['capacity'] / GIB:.2f}",
        "yes" if cell["fits"] else "no",
        *times,
        f"{cell['compile_seconds']:.0f}",
    )


def _missing(plans: Plans) -> Iterator[str]:
    for model in CELLS:
        absent = [one.label for one in METHODS if one.label not in plans.get(model.name, {})]
        if absent:
            yield f"- {model.name}: {', '.join(absent)}"


def report(plans: Plans) -> str:
    """The cells in Markdown."""
    some = next(cell for cells in plans.values() for cell in cells.values() if "peak" in cell)
    lines = [
        f"One training step as its machine's compiler has it (jax {some['jax']}), for one device: rows of "
        "4,096 tokens, one for each device, all devices on `fsdp`, bfloat16, blocks recomputed in the "
        "backward pass (but of MEFT, whose blocks are inverted). Needs: the largest of the step and of "
        "what is done between steps, with the program. Collectives: what they bring a device in a step. "
        "Seconds: the least that arithmetic, memory and links take; the rate is that of the largest of "
        "the three, and no measurement.",
        "",
    ]
    for model in CELLS:
        cells = plans.get(model.name, {})
        rows = [row(one.label, cells[one.label]) for one in METHODS if one.label in cells]
        reasons = [f"- {label}: {cell['reason']}" for label, cell in cells.items() if "reason" in cell]
        if rows:
            lines += [f"## {model.name}", "", *table(HEADER, rows), "", *reasons, *([""] if reasons else [])]
    if missing := list(_missing(plans)):
        lines += ["## Not recorded yet", "", *missing, ""]
    lines += ["## Weak scaling", "", *scaling.section(plans), ""]
    lines += ["## Beside a published rate", "", *_published(plans), ""]
    return "\n".join(lines)


def _published(plans: Plans) -> list[str]:
    cell = plans.get(PUBLISHED.name, {}).get(NO_REMAT.label)
    if cell is None or "peak" not in cell:
        return ["Not recorded yet."]
    said = (
        "LoRA of rank 16 on Llama-3-8B, 2 x 4,096 tokens in bfloat16 on one H100, nothing recomputed: "
        f"published are {RATE:,} tokens/s ({SOURCE}); the bound of this library's program there is "
        f"{rate(cell):,.0f}, of which that is {RATE / rate(cell):.0%}. It needs {needs(cell):.1f} GiB of "
        f"{cell['capacity'] / GIB:.1f}."
    )
    return [said, "", *table(HEADER, [row(NO_REMAT.label, cell)])]


def draw(plans: Plans, file: Path) -> None:
    """What a device needs against what it has, and the rate at most, of every cell that compiles."""
    cells = [
        (f"{model.name}, {one.label}", plans[model.name][one.label])
        for model in CELLS
        for one in METHODS
        if one.label in plans.get(model.name, {})
    ]
    known = [(label, cell, needs(cell)) for label, cell in cells if needs(cell) is not None]
    with saved(file, 3, size=(14, 3 + 0.2 * len(known))) as (_, axes):
        names = [label for label, _, _ in known]
        shares = [GIB * size / cell["capacity"] for _, cell, size in known]
        axes[0].barh(names, shares, color=["#1b6ca8" if cell["fits"] else "#c8553d" for _, cell, _ in known])
        axes[0].axvline(1, color="k", linewidth=0.8)
        axes[0].set_xlabel("of a device's memory (red does not fit)")
        axes[1].barh(
            names, [(rate(cell) or 0) if "peak" in cell else 0 for _, cell, _ in known], color="#8fa1b3"
        )
        axes[1].set_xlabel("tokens/s a device, at most")
        axes[1].set_yticks([])
        for axis in axes[:2]:
            axis.invert_yaxis()
        found = scaling.brought(plans)
        axes[2].plot(list(found), list(found.values()), "o-")
        axes[2].set_xscale("log", base=2)
        axes[2].set_xticks(list(found), [str(chips) for chips in found])
        axes[2].set_ylim(0, 1.2 * max(found.values(), default=1))
        axes[2].set_xlabel("chips (v5e), Llama-3-8B, LoRA")
        axes[2].set_ylabel("collectives, GiB a chip and step")


def answer(plans: Plans) -> dict[str, str]:
    """The bound beside the published rate, and LoRA and QLoRA on every machine."""
    told = {"Weak scaling": scaling.verdict(plans)}
    cell = plans.get(PUBLISHED.name, {}).get(NO_REMAT.label, {})
    if "peak" in cell:
        told[PUBLISHED.name] = f"at most {rate(cell):,.0f} tokens/s (published {RATE:,})"
    for model in CELLS:
        for label in ("LoRA", "QLoRA"):
            cell = plans.get(model.name, {}).get(label, {})
            if "peak" in cell:
                fits = "fits" if cell["fits"] else "does not fit"
                told[f"{model.name}, {label}"] = f"{needs(cell):.2f} GiB, {fits}" + (
                    "" if rate(cell) is None else f", at most {rate(cell):,.0f} tokens/s a device"
                )
            elif "fits" in cell:
                told[f"{model.name}, {label}"] = "does not fit"
    return told


REPORT = memory_report(report, draw, answer)


def make_table() -> Table:
    """All cells."""
    return Table((PUBLISHED, *OTHERS, *CELLS), CONTENDERS, REPORT, asked=asked)
