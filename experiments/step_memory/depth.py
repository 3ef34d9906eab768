"""Peak memory of a step against depth and against the length of a text.

RoBERTa-large, 32 texts a step: 512 tokens and 6 to 48 layers, then 24 layers and 128 to 2,048 tokens. The
weights of the layers are taken off, so that what is left is what grows with depth for another reason.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.harness.memory import Model, Plans, Table, memory_report
from experiments.harness.plot import saved
from experiments.harness.report import table
from experiments.step_memory.blocks import CONTENDERS
from experiments.step_memory.models import roberta_large

SHOWN = ("full", "LoRA", "LoRA + remat", "LoRA + 4-bit residuals", "LST 1/8", "MEFT1", "MEFT1, no anchors")


def report(plans: Plans) -> str:
    """What a step works with, by depth and length."""
    labels = list(dict.fromkeys(label for rows in plans.values() for label in rows))
    rows = [
        [label, *(f"{found[label]['working'] / 2**20:,.0f}" for found in plans.values() if label in found)]
        for label in labels
    ]
    about = "The peak of a step of RoBERTa-large less weights and optimizer state, in MiB; 32 texts a step."
    return "\n".join([about, "", *table(["", *plans], rows), ""])


def draw(plans: Plans, file: Path) -> None:
    """Two curves of every contender."""
    with saved(file, 2, size=(10, 4)) as (_, axes):
        for axis, what in zip(axes, ("layers", "tokens")):
            found = {int(name.split()[0]): rows for name, rows in plans.items() if name.endswith(what)}
            for label in dict.fromkeys(label for rows in found.values() for label in rows):
                sizes = {number: rows[label]["working"] for number, rows in found.items() if label in rows}
                axis.plot(list(sizes), [size / 2**30 for size in sizes.values()], "o-", label=label)
            axis.set_xlabel(what)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_ylabel("peak beside weights and optimizer, GiB")
        axes[0].legend(fontsize=8)


def answer(plans: Plans) -> dict[str, str]:
    """How much more a step works with when the model is eight times as deep."""
    few, many = plans.get("6 layers", {}), plans.get("48 layers", {})
    return {
        label: f"x {many[label]['working'] / few[label]['working']:.1f} from 6 to 48 layers"
        for label in ("full", "LoRA", "LoRA + remat", "MEFT1, no anchors")
        if label in few and label in many
    }


REPORT = memory_report(report, draw, answer)


def make_table(
    model: Model | None = None,
    depths: tuple[int, ...] = (6, 12, 24, 48),
    lengths: tuple[int, ...] = (128, 512, 1024, 2048),
) -> Table:
    """A model, by default RoBERTa-large, with other depths and with other lengths."""
    model = model or roberta_large()
    deep = [dataclasses.replace(model, name=f"{count} layers", layers=count) for count in depths]
    long = [dataclasses.replace(model, name=f"{count} tokens", length=count) for count in lengths]
    shown = tuple(contender for contender in CONTENDERS if contender.label in SHOWN)
    return Table((*deep, *long), shown, REPORT)
