"""PEFT's files of the methods in `peftjax/methods/lowrank` other than LoRA and its kin."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, rank_of
from peftjax.hf.forms.form import Arrays, Form, SlotForm, column, same, transposed
from peftjax.methods.lowrank.tinylora import group_count, group_of

Steps = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(ge=0)]


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


def _one_rank(options: Mapping[str, Any], type: str) -> int:
    if options["rank_pattern"]:
        raise PeftError(f"PEFT's {type} has one rank for all weights; train without rank_pattern")
    return options["rank"]


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
        "r": _one_rank(options, "RANDLORA"),
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
        "r": _one_rank(options, "VBLORA"),
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
        "init_r": _one_rank(options, "ADALORA"),
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


def _left(arrays: Arrays, shared: Arrays) -> Arrays:
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
)


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
        "r": _one_rank(options, "TINYLORA"),
        "u": options["size"],
        "weight_tying": options["tying"],
        "tinylora_dropout": options["dropout"],
    },
    _tinylora_options,
    shared={"v": same("tinylora_v.{row}")},
    numbered=_group,
)


@dataclass(frozen=True)
class _Unilora:
    r: Count = 4
    proj_seed: int = 42
    theta_d_length: Count = 256
    unilora_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False


def _unilora_options(fields: _Unilora) -> dict[str, Any]:
    if not fields.save_indices:
        raise PeftError(
            "the file lacks the indices, which PEFT draws from a seed; save the adapter again with "
            "save_indices=True"
        )
    return {
        "rank": fields.r,
        "size": fields.theta_d_length,
        "bound": fields.init_theta_d_bound,
        "dropout": fields.unilora_dropout,
    }


def _scaled(arrays: Arrays, shared: Arrays) -> Arrays:
    scales = {f"scale_{side}": shared["scale"][arrays[f"index_{side}"]] for side in ("a", "b")}
    return {**arrays, **scales}


def _scale(modules: Sequence[Arrays], fields: _Unilora) -> Arrays:
    """The scale of each number of the vector, of those that are chosen."""
    scale = np.zeros(fields.theta_d_length, np.float32)
    for arrays in modules:
        for side in ("a", "b"):
            scale[arrays[f"index_{side}"]] = arrays[f"scale_{side}"]
    return {"scale": scale}


def _long(v: np.ndarray) -> np.ndarray:
    return v.astype(np.int64)


def _long_swapped(v: np.ndarray) -> np.ndarray:
    return v.swapaxes(-1, -2).astype(np.int64)


UNILORA = Form(
    "unilora",
    "UNILORA",
    {
        "index_a": SlotForm("unilora_indices_A", _long),
        "index_b": SlotForm("unilora_indices_B", _long_swapped, _long_swapped),
        "scale_a": same("unilora_scales_A"),
        "scale_b": transposed("unilora_scales_B"),
    },
    _Unilora,
    lambda options: {
        "r": _one_rank(options, "UNILORA"),
        "theta_d_length": options["size"],
        "init_theta_d_bound": options["bound"],
        "unilora_dropout": options["dropout"],
        "save_indices": True,
    },
    _unilora_options,
    shared={"theta": same("unilora_theta_d")},
    packed=_scaled,
    derived=_scale,
)


@dataclass(frozen=True)
class _Osf:
    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    target_svd_config: dict[str, int] | None = None
    init_weights: bool = True


def _preserved(arrays: Arrays) -> tuple[int, int]:
    """How many directions stay, and how many there are."""
    sides = arrays["u"].shape[-1], arrays["v"].shape[-1]
    return min(sides) - len(arrays["s"]), min(sides)


def _osf_ranks(modules: Mapping[str, Arrays]) -> dict[str, Any]:
    ranks = {f"^{re.escape(module)}": _preserved(arrays) for module, arrays in modules.items()}
    return {"rank_pattern": {name: kept for name, (kept, of) in ranks.items() if kept != of // 2}}


def _osf_preserved(arrays: Arrays) -> dict[str, Any]:
    kept, of = _preserved(arrays)
    return {} if kept == of // 2 else {"preserved": kept}


OSF = Form(
    "osf",
    "OSF",
    {
        "u": same("osf_svd_params.V_low"),
        "s": same("osf_svd_params.S_low"),
        "v": transposed("osf_svd_params.U_low"),
    },
    _Osf,
    of_modules=_osf_ranks,
    of_arrays=_osf_preserved,
)

LOWRANK = (VERA, PVERA, RANDLORA, VBLORA, TINYLORA, UNILORA, ADALORA, DELORA, OSF)
