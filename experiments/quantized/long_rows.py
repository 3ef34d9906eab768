"""QLoRA on one row of many tokens, beside the field's record: Llama-3-8B and 70B."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peftjax as pj
from experiments.harness.contenders import Contender
from experiments.harness.memory import Model, Plans, Table, memory_report
from experiments.harness.plot import saved
from experiments.harness.report import table
from experiments.step_memory.models import llama_model
from peftjax.models.named import named_config

TILE = 2048
"""Tokens that the feed-forward takes at a time."""
RECORDS = {"Llama-3-8B": (7.37, 227.5), "Llama-3-70B": (42.99, 444.6)}
"""Of the longest rows known to us for QLoRA of rank 32: GiB that are fixed, and kB a token."""
LENGTHS = (32_768, 65_536, 131_072)


def on_one_row(name: str, length: int, device: str = "", **machine: str) -> Model:
    """A model on one row of so many tokens, on one device or on a mesh."""
    where = f" on {device}" if device else ""
    model = llama_model(f"{name}, {length:,} tokens{where}", named_config(name.lower()), 1, length)
    return dataclasses.replace(model, **machine)


ALONE = tuple(on_one_row(name, length) for name in RECORDS for length in LENGTHS)
DIVIDED = (
    on_one_row("Llama-3-8B", LENGTHS[-1], "8 v5p", target="v5p:2x2x2", mesh="fsdp=8"),
    on_one_row("Llama-3-8B", LENGTHS[-1], "8 v5e", target="v5e:2x4", mesh="fsdp=8"),
)
"""A mesh whose `fsdp` divides the weights and, as there is one row, the tokens."""


def qlora() -> pj.Transform:
    """LoRA of every linear layer of the blocks, on NF4 codes."""
    return pj.chain(pj.nf4(), pj.lora(rank=32))


def contender(label: str, method: Callable[[], pj.Transform], **options: Any) -> Contender:
    """A method, made without any statistics."""
    return Contender(label, lambda setting: method(), **options)


CONTENDERS = (
    contender("QLoRA, remat", qlora, remat="nothing_saveable"),
    contender("QLoRA, remat, tiles", qlora, remat="nothing_saveable", tile=TILE),
    contender("QLoRA, offloaded, tiles", qlora, remat="offload_attention", tile=TILE),
    contender(
        "MEFT1 on NF4, tiles", lambda: pj.chain(pj.nf4(), pj.meft(variant=1)), matched=False, tile=TILE
    ),
)
LORA: dict[str, Any] = {"method": lambda: pj.lora(rank=32), "remat": "nothing_saveable", "tile": TILE}
IN_BFLOAT16 = (contender("LoRA", **LORA), contender("LoRA, flash", **LORA, attention="flash"))
"""On a base that is not quantized, at the greatest length: attention of both kinds."""


def asked(model: Model, contender: Contender) -> bool:
    """On the larger model only what needs the least."""
    if contender in IN_BFLOAT16 or model in DIVIDED:
        return contender in IN_BFLOAT16 and model.name.startswith(f"Llama-3-8B, {LENGTHS[-1]:,} tokens")
    return model.name.startswith("Llama-3-8B") or contender.label == "QLoRA, offloaded, tiles"


def record(name: str, tokens: int) -> float:
    """GiB of the record at a length."""
    fixed, each = RECORDS[name]
    return fixed + each * 1e3 * tokens / 2**30


def lines(plans: Plans) -> Iterator[tuple[str, str, dict[int, dict[str, Any]]]]:
    """Model, contender and the plans by length."""
    for name in RECORDS:
        rows = {length: plans.get(f"{name}, {length:,} tokens", {}) for length in LENGTHS}
        for one in CONTENDERS:
            found = {
                length: row[one.label] for length, row in rows.items() if "peak" in row.get(one.label, {})
            }
            if found:
                yield name, one.label, found


def growth(found: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """GiB that are fixed and kB a token, of the line through the shortest and the longest row."""
    short, long = min(found), max(found)
    each = (found[long]["peak"] - found[short]["peak"]) / (long - short)
    return (found[short]["peak"] - each * short) / 2**30, each / 1e3


def report(plans: Plans) -> str:
    """The plans in Markdown."""
    some = next(plan for rows in plans.values() for plan in rows.values() if "peak" in plan)
    text = [
        f"One training step on one row, as compiled for {some['device']} by jax {some['jax']}: peak "
        "of device memory in GiB, in brackets what lies in the host's. Fixed and per token: the line "
        "through the shortest and the longest row.",
        "",
    ]
    rows = []
    for name, label, found in lines(plans):
        cells = [
            f"{found[length]['peak'] / 2**30:.2f} ({found[length]['bytes']['host'] / 2**30:.0f})"
            if length in found
            else ""
            for length in LENGTHS
        ]
        fixed, each = growth(found)
        rows.append((name, label, *cells, f"{fixed:.2f}", f"{each:.1f}"))
    for name, (fixed, each) in RECORDS.items():
        cells = [f"{record(name, length):.2f}" for length in LENGTHS]
        rows.append((name, "the record", *cells, f"{fixed:.2f}", f"{each:.1f}"))
    header = ("", "", *(f"{length:,}" for length in LENGTHS), "GiB fixed", "kB a token")
    return "\n".join([*text, *table(header, rows), "", *in_bfloat16(plans)])


def in_bfloat16(plans: Plans) -> list[str]:
    """The plans of a base that is not quantized."""
    rows = []
    for model, one in itertools.product((ALONE[len(LENGTHS) - 1], *DIVIDED), IN_BFLOAT16):
        if "peak" in (plan := plans.get(model.name, {}).get(one.label, {})):
            sizes, moved = plan["bytes"], (plan["collectives"] or {}).items()
            passed = ", ".join(f"{kind} {traffic['nbytes'] / 2**30:.1f}" for kind, traffic in moved)
            cells = (f"{size / 2**30:.2f}" for size in (plan["peak"], sizes["weights"], sizes["temporaries"]))
            unread = "not read" if plan["devices"] > 1 else ""
            rows.append((one.label, plan["device"], str(plan["devices"]), *cells, passed or unread))
    if not rows:
        return []
    header = ("", "device", "devices", "peak", "weights", "temporaries", "between them")
    text = f"Llama-3-8B in bfloat16, one row of {LENGTHS[-1]:,} tokens: GiB of one device."
    return [text, "", *table(header, rows), ""]


def draw(plans: Plans, file: Path) -> None:
    """The peaks by length, and the record's line."""
    with saved(file, len(RECORDS), size=(5 * len(RECORDS), 4)) as (_, axes):
        for axis, name in zip(axes, RECORDS):
            for model, label, found in lines(plans):
                if model == name:
                    axis.plot(list(found), [one["peak"] / 2**30 for one in found.values()], "o-", label=label)
            axis.plot(LENGTHS, [record(name, length) for length in LENGTHS], "k--", label="the record")
            axis.set_title(name)
            axis.set_xlabel("tokens of the row")
            axis.set_ylabel("peak, GiB")
            axis.set_ylim(0)
            axis.legend(fontsize=8)


def answer(plans: Plans) -> dict[str, str]:
    """The best policy of each model beside the record."""
    best = "QLoRA, offloaded, tiles"
    return {
        f"{name}, {label}": f"{fixed:.2f} GiB + {each:.1f} kB a token (record {RECORDS[name][0]:.2f} + "
        f"{RECORDS[name][1]:.1f})"
        for name, label, found in lines(plans)
        if label == best
        for fixed, each in [growth(found)]
    }


REPORT = memory_report(report, draw, answer)
make_table = partial(Table, (*ALONE, *DIVIDED), (*CONTENDERS, *IN_BFLOAT16), REPORT, asked=asked)
