"""PEFT's files of DEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftjax.hf.forms.fields import Count, Rate, rank_of
from peftjax.hf.forms.form import Form, same, transposed


@dataclass(frozen=True)
class _Deft:
    r: Count = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    deft_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True


DEFT = Form(
    "deft",
    "DEFT",
    {"p": transposed("deft_P"), "r": same("deft_R")},
    _Deft,
    lambda options: {
        "decomposition_method": options["directions"],
        "alpha": options["alpha"],
        "para": options["removed_only"],
        "deft_dropout": options["dropout"],
    },
    lambda fields: {
        "directions": fields.decomposition_method,
        "alpha": fields.alpha,
        "removed_only": fields.para,
        "dropout": fields.deft_dropout,
    },
    rank=rank_of("p"),
    bias="deft_only",
    with_fields=lambda slots, fields: {"p": slots["p"]} if fields.para else slots,
)
