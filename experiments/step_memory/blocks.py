"""Methods of blocks beside LoRA and full fine-tuning, and what their papers claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peftjax as pj
from experiments.harness.contenders import Contender
from experiments.harness.memory import Model, Plans, Table, memory_report, peaks
from experiments.harness.plot import saved, stacked_bars
from experiments.harness.report import table
from experiments.step_memory.models import block_models


@dataclasses.dataclass(frozen=True)
class Claim:
    """That a method needs a share less than full fine-tuning.

    Attributes:
        share: how much less.
        of: "kept", the activations, or "peak", all.
    """

    share: float
    of: Literal["kept", "peak"]

    def __str__(self) -> str:
        """A few words for a table."""
        return f"{self.share:.0%} less {'activations' if self.of == 'kept' else 'in all'} than full"


def contender(label: str, method: Callable[[], pj.Transform], **options: Any) -> Contender:
    """A method that needs to know nothing of the run."""
    return Contender(label, lambda setting: method(), **options)


def coded(method: Callable[[], pj.Transform]) -> pj.Transform:
    """A method on blocks whose residuals are codes."""
    return pj.chain(pj.coded_residuals(), method())


CONTENDERS = (
    contender("full", pj.full),
    contender("LoRA", pj.lora),
    contender("LoRA + remat", pj.lora, remat="nothing_saveable"),
    contender("LoRA + save_attention", pj.lora, remat="save_attention"),
    contender("LoRA + offload", pj.lora, remat="offload_attention"),
    contender("LoRA + 4-bit residuals", partial(coded, pj.lora)),
    contender("BitFit + 4-bit residuals", partial(coded, pj.bitfit)),
    contender("S2A", pj.s2a),
    contender("Houlsby", pj.houlsby),
    contender("Pfeiffer", pj.pfeiffer),
    contender("parallel adapter", pj.parallel_adapter),
    contender("AdaptFormer", pj.adaptformer),
    contender("prefix", partial(pj.prefix, mlp_size=None)),
    contender("MAM", pj.mam),
    contender("LST 1/8", pj.lst),
    # The layers that the authors use of T5-large, which has 24.
    contender("LST 1/8, every second layer", partial(pj.lst, side_layers=range(1, 24, 2))),
    *(contender(f"MEFT{v}", partial(pj.meft, variant=v)) for v in (1, 2, 3)),
    *(contender(f"MEFT{v}, no anchors", partial(pj.meft, variant=v, anchor_every=0)) for v in (1, 2, 3)),
    contender("UniPT", pj.unipt),
    contender("SHERL", pj.sherl),
    contender("VQT", pj.vqt, own_head=True),
    contender("VQT, two passes", partial(pj.vqt, passes=2), own_head=True),
)
CLAIMS = {
    "S2A": Claim(0.75, "peak"),
    **dict.fromkeys(("LST 1/8", "LST 1/8, every second layer"), Claim(0.69, "peak")),
    **{f"MEFT{v}{anchors}": Claim(0.84, "kept") for anchors in ("", ", no anchors") for v in (1, 2, 3)},
}
LABELS = tuple(contender.label for contender in CONTENDERS)
MIB = 2**20
HEADER = (
    "",
    "trained",
    "weights",
    "optimizer",
    "activations",
    "/ full",
    "temporaries",
    "on the host",
    "peak",
    "/ full",
    "TFLOP",
    "the paper's claim",
)


def report(plans: Plans) -> str:
    """The plans in Markdown, the contenders in their order."""
    some = next(plan for rows in plans.values() for plan in rows.values() if "peak" in plan)
    lines = [
        f"One training step as compiled for {some['device']} by jax {some['jax']}; MiB. Weights are all "
        "frozen and trained parameters. Activations are what the forward pass keeps for the backward pass; "
        "temporaries have them, the gradients, and what one layer needs while it works, as far as they are "
        "on the device.",
        "",
    ]
    for name, rows in plans.items():
        labels = [label for label in LABELS if label in rows]
        cells = [_cells(label, rows) for label in labels if "peak" in rows[label]]
        reasons = [f"- {label}: {rows[label]['reason']}" for label in labels if "reason" in rows[label]]
        lines += [f"## {name}", "", *table(HEADER, cells), "", *reasons, *([""] if reasons else [])]
    return "\n".join([*lines, "## Claims", "", *(f"- {claim}" for claim in claims(plans)), ""])


def claims(plans: Plans) -> list[str]:
    """The papers' claims that have a number, each with what was measured."""
    found = []
    for label, claim in CLAIMS.items():
        less = {
            model: 1 - rows[label][claim.of] / rows["full"][claim.of]
            for model, rows in plans.items()
            if all("peak" in rows.get(name, {}) for name in (label, "full"))
        }
        if less:
            holds = all(share >= claim.share for share in less.values())
            measured = ", ".join(f"{model} {share:.1%}" for model, share in less.items())
            verdict = "confirmed" if holds else "not confirmed on all"
            found.append(f"{label}, {claim}: {verdict} ({measured}).")
    return found


def _cells(label: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    plan, full = rows[label], rows.get("full", {})
    sizes = plan["bytes"]

    def share(part: str) -> str:
        return f"{plan[part] / full[part]:.3f}" if part in full else ""

    def mib(size: int) -> str:
        return f"{size / MIB:,.0f}"

    return [
        label,
        f"{plan['trainable_parameters']:,}",
        mib(sizes["weights"] + sizes["method_state"] + sizes["trainable"]),
        mib(sizes["optimizer"]),
        mib(plan["kept"]),
        share("kept"),
        mib(sizes["temporaries"]),
        mib(sizes.get("host", 0)),
        mib(plan["peak"]),
        share("peak"),
        f"{plan['flops'] / 1e12:,.1f}",
        str(CLAIMS.get(label, "")),
    ]


def draw(plans: Plans, file: Path) -> None:
    """The peak of every contender, by kind."""
    with saved(file, len(plans), size=(5 * len(plans), 5)) as (_, axes):
        for axis, (model, rows) in zip(axes, plans.items()):
            found = {label: rows[label] for label in LABELS if "peak" in rows.get(label, {})}
            stacked_bars(axis, found, 2**30)
            axis.set_title(model)
            axis.set_xlabel("peak, GiB")
        axes[0].legend(fontsize=8)


def answer(plans: Plans) -> dict[str, str]:
    """The peaks of a few contenders on RoBERTa-large."""
    chosen = ("full", "LoRA", "LoRA + remat", "LoRA + 4-bit residuals", "S2A", "LST 1/8", "MEFT1")
    return peaks(plans, "RoBERTa-large", chosen)


REPORT = memory_report(report, draw, answer)


def make_table(models: tuple[Model, ...] | None = None) -> Table:
    """The contenders on given models, by default the three of the recorded table."""
    return Table(models or block_models(), CONTENDERS, REPORT)
