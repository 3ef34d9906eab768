"""Weak scaling: the same work for every chip, on 1 to 256 chips of a TPU v5e."""

from __future__ import annotations

from typing import Any

from experiments.harness.contenders import Contender
from experiments.harness.memory import Model, Plans
from experiments.harness.report import table
from experiments.plan.cells import METHODS, SLICES, on

LORA, QLORA = METHODS[:2]
CELLS = tuple(on("Llama-3-8B", one) for one in SLICES)
FLAT = 1.1
"""How far the most may be above the least, of 16 chips and more, to be called flat."""
GIB = 2**30
HEADER = ("chips", "", "GiB a chip", "by kind", "GiB over its links")


def asked(model: Model, contender: Contender) -> bool:
    """On one chip, which does not hold the weights in 16 bits, with a base of 4 bits."""
    return (contender is QLORA) == (model.mesh is None) and contender in (LORA, QLORA)


def collected(cell: dict[str, Any], of: str = "nbytes") -> float:
    """GiB that collectives bring a device in a step, or that pass its links at least."""
    return sum(one[of] for one in cell["collectives"].values()) / GIB


def brought(plans: Plans) -> dict[int, float]:
    """GiB that collectives bring a chip in a step of LoRA, by the number of chips."""
    cells = {
        target.devices: plans.get(model.name, {}).get(LORA.label, {}) for target, model in zip(SLICES, CELLS)
    }
    return {chips: collected(cell) for chips, cell in cells.items() if chips > 1 and "peak" in cell}


def verdict(plans: Plans) -> str:
    """Whether it is flat, in one sentence."""
    found = {chips: size for chips, size in brought(plans).items() if chips >= 16}
    if len(found) < 2:
        return "not known yet"
    ratio = max(found.values()) / min(found.values())
    said = "flat" if ratio <= FLAT else "not flat"
    return f"{said}, at most {ratio:.3f} times the least bytes a chip, {min(found)} to {max(found)} chips"


def section(plans: Plans) -> list[str]:
    """The lines of the report."""
    rows = []
    for target, model in zip(SLICES, CELLS):
        for one in (LORA, QLORA):
            cell = plans.get(model.name, {}).get(one.label, {})
            if asked(model, one) and "peak" in cell:
                kinds = ", ".join(
                    f"{kind} {traffic['nbytes'] / GIB:.3f} in {traffic['runs']:,}"
                    for kind, traffic in cell["collectives"].items()
                )
                sizes = f"{collected(cell):.3f}", kinds, f"{collected(cell, 'crossing'):.3f}"
                rows.append((target.devices, one.label, *sizes))
            elif asked(model, one):
                rows.append((target.devices, one.label, cell.get("reason", "not recorded yet"), "", ""))
    return [
        "Llama-3-8B with LoRA on a TPU v5e, one row a chip. One chip does not hold the weights in 16 "
        "bits, so that there it is QLoRA, with nothing to pass on.",
        "",
        *table(HEADER, rows),
        "",
        f"Collective bytes a chip: {verdict(plans)}.",
    ]
