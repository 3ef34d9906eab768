"""PEFT's files of GRALORA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from peftjax.hf.forms.fields import Count, Rate
from peftjax.hf.forms.form import Form, SlotForms, same, transposed


@dataclass(frozen=True)
class _Gralora:
    r: Count = 32
    alpha: float = 64.0
    hybrid_r: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    gralora_k: Count = 2
    gralora_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True


def _with_general(slots: SlotForms, fields: _Gralora) -> SlotForms:
    return slots if fields.hybrid_r else {slot: slots[slot] for slot in ("a", "b")}


GRALORA = Form(
    "gralora",
    "GRALORA",
    {
        "a": transposed("gralora_A"),
        "b": same("gralora_B"),
        "c": same("gralora_A_general.weight"),
        "d": transposed("gralora_B_general.weight"),
    },
    _Gralora,
    lambda options: {
        "alpha": options["alpha"],
        "hybrid_r": options["general"],
        "gralora_k": options["blocks"],
        "gralora_dropout": options["dropout"],
    },
    lambda fields: {
        "alpha": fields.alpha,
        "general": fields.hybrid_r,
        "blocks": fields.gralora_k,
        "dropout": fields.gralora_dropout,
    },
    rank=lambda arrays: arrays["a"].shape[-2],
    bias="gralora_only",
    with_fields=_with_general,
)
