"""PEFT's files of VERA."""

from __future__ import annotations

from dataclasses import dataclass

from peftjax.hf.forms.fields import Count, Rate
from peftjax.hf.forms.form import Form, same, transposed


@dataclass(frozen=True)
class _Vera:
    r: Count = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: Rate = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True


VERA = Form(
    "vera",
    "VERA",
    {"d": same("vera_lambda_d"), "c": same("vera_lambda_b")},
    _Vera,
    lambda options: {"r": options["rank"], "vera_dropout": options["dropout"], "d_initial": options["d"]},
    lambda fields: {"rank": fields.r, "dropout": fields.vera_dropout, "d": fields.d_initial},
    shared={"a": same("vera_A"), "b": transposed("vera_B")},
)
