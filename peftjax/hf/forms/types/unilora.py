"""PEFT's files of UNILORA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, one_rank
from peftjax.hf.forms.form import Arrays, Form, SlotForm, same, transposed


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


def _scaled(arrays: Arrays, shared: Arrays, options: Mapping[str, Any]) -> Arrays:
    scales = {f"scale_{side}": shared["scale"][arrays[f"index_{side}"]] for side in ("a", "b")}
    return {**arrays, **scales}


def _scale(modules: Sequence[Arrays], shared: Arrays, fields: _Unilora) -> Arrays:
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
        "r": one_rank(options, "UNILORA"),
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
