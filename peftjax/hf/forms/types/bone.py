"""PEFT's files of BONE."""

from __future__ import annotations

from typing import Any

from peftjax.hf.forms.fields import no_dropout
from peftjax.hf.forms.form import Form, transposed
from peftjax.hf.forms.types.miss import MissFields


def _bone_options(fields: MissFields) -> dict[str, Any]:
    no_dropout(fields, "miss_dropout")
    return {}


BONE = Form(
    "bone",
    "MISS",
    {"block": transposed("miss_block")},
    MissFields,
    lambda options: {"init_weights": "bat"},
    _bone_options,
    rank=lambda arrays: arrays["block"].shape[-1],
    where={"init_weights": "bat"},
)
