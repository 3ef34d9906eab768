"""LoRA and reversible blocks on bases of 16 and of 4 bits: LLaMA-7B, 13B and 65B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peftjax as pj
from experiments.harness.contenders import Contender
from experiments.harness.memory import Model, Plans, Table, memory_report
from experiments.harness.plot import saved, stacked_bars
from experiments.harness.report import table
from experiments.step_memory.models import llama_model

REMAT = "nothing_saveable"
CLAIMED = 48
"""GiB of the GPU on which QLoRA's paper tunes 65B (arXiv 2305.14314)."""


def llama(name: str, width: int, inner: int, layers: int, heads: int, batch: int) -> Model:
    """One of the first LLaMAs, on rows of 512 tokens."""
    values = {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    return llama_model(f"{name}, {batch} x 512", values, batch, 512)


SIZES = (("7B", 4096, 11_008, 32, 32), ("13B", 5120, 13_824, 40, 40), ("65B", 8192, 22_016, 80, 64))
MODELS = tuple(llama(*size, batch) for size in SIZES for batch in (1, 16))


def on_nf4(method: Callable[[], pj.Transform]) -> pj.Transform:
    """The method on a base of NF4 codes."""
    return pj.chain(pj.nf4(), method())


def _contender(label: str, method: Callable[[], pj.Transform], **options: Any) -> Contender:
    return Contender(label, lambda setting: method(), **options)


LORA, MEFT = partial(pj.lora, rank=64, alpha=16.0), partial(pj.meft, variant=1)
CONTENDERS = (
    _contender("LoRA, bfloat16", LORA),
    _contender("QLoRA", partial(on_nf4, LORA)),
    _contender("LoRA, bfloat16 + remat", LORA, remat=REMAT),
    _contender("QLoRA + remat", partial(on_nf4, LORA), remat=REMAT),
    _contender("QPaCA", partial(pj.qpaca, rank=64)),
    _contender("QPaCA + remat", partial(pj.qpaca, rank=64), remat=REMAT),
    _contender("PEQA, int4", partial(pj.peqa, format="int4")),
    _contender("PEQA, int4 + remat", partial(pj.peqa, format="int4"), remat=REMAT),
    _contender("QLoRA + 4-bit residuals", lambda: pj.chain(pj.nf4(), pj.coded_residuals(), LORA())),
    _contender("MEFT1, NF4", partial(on_nf4, MEFT)),
)
LABELS = tuple(contender.label for contender in CONTENDERS)
HEADER = ("", "trained", "weights", "optimizer", "activations", "temporaries", "peak", "/ LoRA, bfloat16")


def asked(model: Model, contender: Contender) -> bool:
    """On 16 rows what keeps all activations is left out."""
    bare = contender.label in ("LoRA, bfloat16", "QLoRA", "QPaCA", "PEQA, int4")
    return not (bare and model.batch > 1)


def report(plans: Plans) -> str:
    """The plans in Markdown."""
    some = next(plan for rows in plans.values() for plan in rows.values() if "peak" in plan)
    lines = [
        f"One training step as compiled for {some['device']} by jax {some['jax']}; GiB. Weights are all that "
        "stays of the base; activations are what the forward pass keeps for the backward pass; temporaries "
        "have them, the gradients, and what one layer needs while it works.",
        "",
    ]
    for name, rows in plans.items():
        cells = [_cells(label, rows) for label in LABELS if "peak" in rows.get(label, {})]
        reasons = [
            f"- {label}: {rows[label]['reason']}" for label in LABELS if "reason" in rows.get(label, {})
        ]
        lines += [f"## {name}", "", *table(HEADER, cells), "", *reasons, *([""] if reasons else [])]
    largest = {
        f"{label} on {name}": plan["peak"] / 2**30
        for name, rows in plans.items()
        for label, plan in rows.items()
        if name.startswith("65B") and "peak" in plan and label != "LoRA, bfloat16"
    }
    within = {True: "within", False: "more than"}
    verdicts = [
        f"- {what}: {size:.1f} GiB, {within[size <= CLAIMED]} the {CLAIMED} GiB of the paper's GPU."
        for what, size in largest.items()
    ]
    return "\n".join([*lines, "## 65B on one GPU", "", *verdicts, ""])


def _cells(label: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    plan, sizes = rows[label], rows[label]["bytes"]
    of = next(
        (rows[one] for one in ("LoRA, bfloat16", "LoRA, bfloat16 + remat") if "peak" in rows.get(one, {})),
        None,
    )
    parts = (sizes["weights"], sizes["optimizer"], plan["kept"], sizes["temporaries"], plan["peak"])
    share = "" if of is None else f"{plan['peak'] / of['peak']:.3f}"
    return [label, f"{plan['trainable_parameters']:,}", *(f"{part / 2**30:,.2f}" for part in parts), share]


def draw(plans: Plans, file: Path) -> None:
    """The peak of every contender, by kind."""
    with saved(file, len(plans), size=(4 * len(plans), 4)) as (_, axes):
        for axis, (model, rows) in zip(axes, plans.items()):
            stacked_bars(
                axis, {label: rows[label] for label in LABELS if "peak" in rows.get(label, {})}, 2**30
            )
            axis.set_title(model)
            axis.set_xlabel("peak, GiB")
        axes[0].legend(fontsize=8)


def answer(plans: Plans) -> dict[str, str]:
    """The peaks that the paper's claim is about, and those of 7B."""
    return {
        f"{name}, {label}": f"{rows[label]['peak'] / 2**30:.2f} GiB"
        for name, rows in plans.items()
        for label in ("LoRA, bfloat16", "QLoRA", "QLoRA + remat")
        if name.split(",")[0] in ("7B", "65B") and "peak" in rows.get(label, {})
    }


REPORT = memory_report(report, draw, answer)


def make_table() -> Table:
    """All contenders on all models."""
    return Table(MODELS, CONTENDERS, REPORT, asked=asked)
