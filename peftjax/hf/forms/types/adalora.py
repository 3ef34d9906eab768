"""PEFT's files of ADALORA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Positive, Rate, Steps, one_rank
from peftjax.hf.forms.form import Arrays, Form, column, same, transposed
from peftjax.hf.forms.kinds import flat_inputs


@dataclass(frozen=True)
class _Adalora:
    target_r: Count = 8
    init_r: Count = 12
    tinit: Steps = 0
    tfinal: Steps = 0
    deltaT: Count = 1
    beta1: Rate = 0.85
    beta2: Rate = 0.85
    orth_reg_weight: Positive = 0.5
    total_step: Count = 1
    rank_pattern: dict[str, list[bool]] | None = None
    lora_alpha: float = 8
    lora_dropout: Rate = 0.0
    r: int = 8  # of LoRA, whose fields the type has too
    fan_in_fan_out: bool = False
    init_lora_weights: bool = True
    qalora_group_size: int = 16
    megatron_core: str | None = None


def _adalora_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "target_r": options["target_rank"],
        "init_r": one_rank(options, "ADALORA"),
        "tinit": options["init_warmup"],
        "tfinal": options["final_warmup"],
        "deltaT": options["allocate_every"],
        "beta1": options["beta1"],
        "beta2": options["beta2"],
        "orth_reg_weight": options["orthogonality"],
        "total_step": options["total_steps"],
        "lora_alpha": options["alpha"],
        "lora_dropout": options["dropout"],
    }


def _adalora_options(fields: _Adalora) -> dict[str, Any]:
    return {
        "target_rank": fields.target_r,
        "rank": fields.init_r,
        "init_warmup": fields.tinit,
        "final_warmup": max(fields.tfinal, 1),
        "allocate_every": fields.deltaT,
        "beta1": fields.beta1,
        "beta2": fields.beta2,
        "orthogonality": fields.orth_reg_weight,
        "total_steps": fields.total_step,
        "alpha": fields.lora_alpha,
        "dropout": fields.lora_dropout,
    }


def _left(arrays: Arrays, shared: Arrays, options: Mapping[str, Any]) -> Arrays:
    """The directions that are not cut for good."""
    return {slot: array[arrays["gate"]] for slot, array in arrays.items() if slot in ("a", "e", "b")}


def _in_place(arrays: Arrays, fields: _Adalora, module: str) -> Arrays:
    """Those of the file, the others zero."""
    gate = np.ones(fields.init_r, bool)
    for key, kept in (fields.rank_pattern or {}).items():
        if key.partition(".lora_E")[0] == module:
            gate = np.asarray(kept)
    if len(gate) != fields.init_r or any(len(array) != gate.sum() for array in arrays.values()):
        raise PeftError(
            f"of {module!r} the file has {len(arrays['e'])} directions, and its configuration {gate.sum()} "
            f"of {len(gate)} with an init_r of {fields.init_r}"
        )
    whole = {slot: np.zeros((len(gate), *array.shape[1:]), array.dtype) for slot, array in arrays.items()}
    for slot, array in arrays.items():
        whole[slot][gate] = array
    return {**whole, "kept": gate, "gate": gate}


def _rank_pattern(modules: Mapping[str, Arrays]) -> dict[str, Any]:
    gates = {f"{module}.lora_E": arrays["gate"].tolist() for module, arrays in modules.items()}
    return {} if all(map(all, gates.values())) else {"rank_pattern": gates}


ADALORA = Form(
    "adalora",
    "ADALORA",
    {"a": same("lora_A"), "b": transposed("lora_B"), "e": column("lora_E")},
    _Adalora,
    _adalora_fields,
    _adalora_options,
    of_modules=_rank_pattern,
    packed=_left,
    unpacked=_in_place,
    kinds={"convolution": flat_inputs("a")},
)
