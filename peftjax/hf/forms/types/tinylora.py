"""PEFT's files of TINYLORA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, one_rank
from peftjax.hf.forms.form import Arrays, Form, same, transposed
from peftjax.methods.lowrank.tinylora import group_count, group_of


@dataclass(frozen=True)
class _Tinylora:
    r: Count = 2
    u: Count = 64
    weight_tying: Annotated[float, Meta(ge=0, le=1)] = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True


def _tinylora_options(fields: _Tinylora) -> dict[str, Any]:
    if not fields.save_projection:
        raise PeftError(
            "the file lacks the random matrices, which PEFT draws from a seed as PyTorch does; save the "
            "adapter again with save_projection=True"
        )
    return {
        "rank": fields.r,
        "size": fields.u,
        "tying": fields.weight_tying,
        "dropout": fields.tinylora_dropout,
    }


def _group(number: int, count: int, fields: _Tinylora) -> Arrays:
    return {"group": np.asarray(group_of(number, count, group_count(count, fields.weight_tying)))}


TINYLORA = Form(
    "tinylora",
    "TINYLORA",
    {"a": same("tinylora_A"), "b": transposed("tinylora_B"), "p": same("tinylora_P")},
    _Tinylora,
    lambda options: {
        "r": one_rank(options, "TINYLORA"),
        "u": options["size"],
        "weight_tying": options["tying"],
        "tinylora_dropout": options["dropout"],
    },
    _tinylora_options,
    shared={"v": same("tinylora_v.{row}")},
    numbered=_group,
)
