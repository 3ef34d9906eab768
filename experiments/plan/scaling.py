"""Weak scaling: the same work for every chip, on 1 to 256 chips of a TPU v5e."""

from __future__ import annotations

from pathlib import Path

from experiments.harness.contenders import Contender
from experiments.harness.memory import Model, Plans, Table, memory_report
from experiments.harness.plot import saved
from experiments.harness.report import table
from experiments.plan.cells import CHIPS, METHODS, SLICES, on
from experiments.plan.topologies import collected, needs, rate

LORA, QLORA = METHODS[:2]
CELLS = tuple(on("Llama-3-8B", one) for one in SLICES)
FLAT = 1.1
"""How far the most may be above the least of 4 chips and more, to be called flat: with n chips a device is
brought all of a weight of which it has 1 / n."""


def asked(model: Model, contender: Contender) -> bool:
    """On one chip, which does not hold the weights in 16 bits, with a base of 4 bits."""
    return (contender is QLORA) == (model.mesh is None)


def brought(plans: Plans) -> dict[int, float]:
    """GiB that collectives bring a chip in a step of LoRA, by the number of chips."""
    cells = {chips: plans.get(model.name, {}).get(LORA.label, {}) for chips, model in zip(CHIPS, CELLS)}
    return {chips: collected(cell) for chips, cell in cells.items() if "peak" in cell}


def verdict(plans: Plans) -> str:
    """Whether it is flat, in one sentence."""
    found = brought(plans)
    if len(found) < 2:
        return "not known yet"
    ratio = max(found.values()) / min(found.values())
    said = "flat" if ratio <= FLAT else "not flat"
    return f"{said}: the most is {ratio:.3f} times the least, from {min(found)} to {max(found)} chips"


def report(plans: Plans) -> str:
    """The cells in Markdown."""
    rows = []
    for chips, model in zip(CHIPS, CELLS):
        for label, cell in plans.get(model.name, {}).items():
            if "peak" not in cell:
                rows.append((chips, label, cell["reason"], "", "", "", "", ""))
                continue
            kinds = ", ".join(
                f"{kind} {one['nbytes'] / 2**30:.3f} in {one['runs']:,}"
                for kind, one in cell["collectives"].items()
            )
            bound = cell["roofline"]
            rows.append(
                (
                    chips,
                    label,
                    f"{needs(cell):.2f}",
                    f"{collected(cell):.3f}",
                    kinds,
                    f"{bound['compute']:.3f}",
                    f"{bound['network']:.3f}",
                    f"{rate(cell):,.0f}",
                )
            )
    missing = [
        model.name
        for model in CELLS
        if not any(asked(model, one) and one.label in plans.get(model.name, {}) for one in (LORA, QLORA))
    ]
    header = (
        "chips", "", "needs, GiB", "collectives, GiB a chip", "by kind", "compute, s", "network, s",
        "tokens/s a chip, at most",
    )  # fmt: skip
    lines = [
        "Llama-3-8B, LoRA of rank 16 in bfloat16, one row of 4,096 tokens a chip, all chips on `fsdp`, "
        "blocks recomputed: a step as the compiler of a TPU v5e has it. One chip does not hold the "
        "weights in 16 bits, so that there it is QLoRA, with nothing to pass on.",
        "",
        *table(header, rows),
        "",
        f"Collective bytes a chip: {verdict(plans)}.",
        "",
    ]
    return "\n".join([*lines, *(f"Not recorded yet: {', '.join(missing)}.\n" for _ in missing[:1])])


def draw(plans: Plans, file: Path) -> None:
    """What collectives bring a chip, by the number of chips."""
    found = brought(plans)
    with saved(file, size=(5, 3.5)) as (_, (axis,)):
        axis.plot(list(found), list(found.values()), "o-")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(found), [str(chips) for chips in found])
        axis.set_ylim(0)
        axis.set_xlabel("chips (TPU v5e)")
        axis.set_ylabel("collectives, GiB a chip and step")


def answer(plans: Plans) -> dict[str, str]:
    """Whether it is flat, and the bytes."""
    sizes = {f"{chips} chips": f"{size:.3f} GiB a chip" for chips, size in brought(plans).items()}
    return {"collectives": verdict(plans), **sizes}


REPORT = memory_report(report, draw, answer)


def make_table() -> Table:
    """All numbers of chips."""
    return Table(CELLS, (LORA, QLORA), REPORT, asked=asked)
