"""PEFT's files of PVERA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate
from peftjax.hf.forms.form import Form, same, transposed


@dataclass(frozen=True)
class _Pvera:
    r: Count = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: Rate = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None


def _pvera_options(fields: _Pvera) -> dict[str, Any]:
    if fields.sample_at_inference:
        raise PeftError(
            "the file has sample_at_inference=True, and peftjax samples in training alone; set it to False "
            "in the configuration to read the adapter with its means"
        )
    return {"rank": fields.r, "dropout": fields.pvera_dropout, "d": fields.d_initial}


PVERA = Form(
    "pvera",
    "PVERA",
    {"d": same("pvera_lambda_d"), "c": same("pvera_lambda_b")},
    _Pvera,
    lambda options: {"r": options["rank"], "pvera_dropout": options["dropout"], "d_initial": options["d"]},
    _pvera_options,
    shared={"a": same("pvera_A"), "b": transposed("pvera_B")},
)
