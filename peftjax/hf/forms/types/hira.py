"""PEFT's files of HIRA."""

from __future__ import annotations

from dataclasses import dataclass

from peftjax.hf.forms.fields import Count, Rate, rank_of
from peftjax.hf.forms.form import Form, same, transposed


@dataclass(frozen=True)
class _Hira:
    r: Count = 32
    rank_pattern: dict[str, Count] | None = None
    hira_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True


HIRA = Form(
    "hira",
    "HIRA",
    {"a": same("hira_A"), "b": transposed("hira_B")},
    _Hira,
    lambda options: {"hira_dropout": options["dropout"]},
    lambda fields: {"dropout": fields.hira_dropout},
    rank=rank_of("a"),
)
