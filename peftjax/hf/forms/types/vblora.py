"""PEFT's files of VBLORA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, one_rank
from peftjax.hf.forms.form import Form, SlotForm, same


@dataclass(frozen=True)
class _Vblora:
    r: Count = 4
    num_vectors: Count = 256
    vector_length: Count = 256
    topk: Count = 2
    save_only_topk_weights: bool = False
    vblora_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1


def _vblora_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "r": one_rank(options, "VBLORA"),
        "num_vectors": options["vectors"],
        "vector_length": options["length"],
        "topk": options["chosen"],
        "vblora_dropout": options["dropout"],
        "init_vector_bank_bound": options["bank_bound"],
        "init_logits_std": options["logits_std"],
    }


def _vblora_options(fields: _Vblora) -> dict[str, Any]:
    if fields.save_only_topk_weights:
        raise PeftError(
            "the file has the chosen weights alone, from which no training goes on; save the adapter again "
            "with save_only_topk_weights=False"
        )
    return {
        "rank": fields.r,
        "vectors": fields.num_vectors,
        "length": fields.vector_length,
        "chosen": fields.topk,
        "dropout": fields.vblora_dropout,
        "bank_bound": fields.init_vector_bank_bound,
        "logits_std": fields.init_logits_std,
    }


def _outputs_first(v: np.ndarray) -> np.ndarray:
    return v.swapaxes(0, 1)


VBLORA = Form(
    "vblora",
    "VBLORA",
    {
        "logits_a": same("vblora_logits_A"),
        "logits_b": SlotForm("vblora_logits_B", _outputs_first, _outputs_first),
    },
    _Vblora,
    _vblora_fields,
    _vblora_options,
    shared={"bank": same("vblora_vector_bank")},
)
