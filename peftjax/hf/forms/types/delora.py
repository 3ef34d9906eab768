"""PEFT's files of DELORA."""

from __future__ import annotations

from dataclasses import dataclass

from peftjax.hf.forms.fields import Count, Rate, rank_of
from peftjax.hf.forms.form import Form, SlotForm, same, transposed


@dataclass(frozen=True)
class _Delora:
    r: Count = 8
    delora_lambda: float = 15
    module_dropout: Rate = 0.0
    rank_pattern: dict[str, Count] | None = None
    lambda_pattern: dict[str, float] | None = None
    init_weights: bool = True


DELORA = Form(
    "delora",
    "DELORA",
    {
        "a": same("delora_A"),
        "b": transposed("delora_B"),
        "bound": SlotForm("delora_lambda", lambda v: v.reshape(1), lambda v: v.reshape(())),
        "norms": same("delora_w_norm"),
    },
    _Delora,
    lambda options: {"delora_lambda": options["bound"], "module_dropout": options["dropout"]},
    lambda fields: {"bound": fields.delora_lambda, "dropout": fields.module_dropout},
    rank=rank_of("a"),
)
