"""PEFT's files of RANDLORA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, one_rank
from peftjax.hf.forms.form import Form, SlotForm, same


@dataclass(frozen=True)
class _Randlora:
    r: Count = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    init_weights: bool = True


def _randlora_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    if options["bases"] == "drawn":
        raise PeftError(
            "randlora: PEFT's files hold the bases, which this method draws in each layer; train with "
            "bases='stored', or merge the adapter"
        )
    return {
        "r": one_rank(options, "RANDLORA"),
        "randlora_alpha": options["alpha"],
        "randlora_dropout": options["dropout"],
    }


def _randlora_options(fields: _Randlora) -> dict[str, Any]:
    return {
        "rank": fields.r,
        "alpha": fields.randlora_alpha,
        "dropout": fields.randlora_dropout,
        "bases": "stored",
    }


def _with_middle(v: np.ndarray) -> np.ndarray:
    return v[:, None]


def _without_middle(v: np.ndarray) -> np.ndarray:
    return v[:, 0]


RANDLORA = Form(
    "randlora",
    "RANDLORA",
    {"scales": same("randlora_lambda"), "gains": same("randlora_gamma")},
    _Randlora,
    _randlora_fields,
    _randlora_options,
    shared={"a": SlotForm("randlora_A", _with_middle, _without_middle), "b": same("randlora_B")},
)
