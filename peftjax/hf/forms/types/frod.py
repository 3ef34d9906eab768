"""PEFT's files of FROD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Rate
from peftjax.hf.forms.form import Arrays, Base, Form, SlotForm, same
from peftjax.methods.structured.frod import NEGLIGIBLE


@dataclass(frozen=True)
class _Frod:
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True
    sparse_rate: Annotated[float, Meta(ge=0, lt=1)] = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False


def _category(module: str) -> str:
    """What PEFT calls the modules that share a basis with one: the last two parts of its name."""
    *before, last = module.split(".")
    if not before or before[-1].isdigit():
        return last
    if before[-2:] == ["attention", "output"] and last == "dense":
        return "attention_output"
    return f"{before[-1]}_{last}"


def _inverse(modules: Sequence[Arrays], shared: Arrays, fields: _Frod) -> Arrays:
    inverse = np.linalg.pinv(shared["v"].astype(np.float64), NEGLIGIBLE)
    return {"inverse": inverse.astype(np.float32), "given": np.ones((), bool)}


def _first_values(arrays: Arrays, shared: Arrays, base: Base, fields: _Frod) -> Arrays:
    """The values with those that the base has, which the file's are instead of."""
    v, w = shared["v"].astype(np.float64), base.weight.astype(np.float64)
    if v.shape != (len(w), len(w)):
        raise PeftError(f"a basis of shape {list(v.shape)} is none of a weight with {len(w)} inputs")
    try:
        own = np.linalg.solve(v, w)
    except np.linalg.LinAlgError:
        own = np.linalg.pinv(v, NEGLIGIBLE) @ w
    return {**arrays, "l0": np.linalg.norm(own, axis=-1).astype(np.float32)}


def _with_size(shared: Arrays) -> Arrays:
    """The basis as a file has it; raises a PeftError for one that is not from a file."""
    if not shared["given"]:
        raise PeftError(
            "frod: PEFT decomposes the base anew where it reads a file, with signs of its own, and what was "
            "trained in the basis found here would mean something else there; merge the adapter, or export "
            "the LoRA that pj.adapters.to_lora makes of it"
        )
    return {**shared, "size": np.asarray(shared["v"].shape, np.int64)}


FROD = Form(
    "frod",
    "FROD",
    {"l": same("frod_lambda_l"), "values": same("frod_lambda_s_values")},
    _Frod,
    lambda options: {
        "frod_dropout": options["dropout"],
        "sparse_rate": options["density"],
        "regularization_alpha": options["ridge"],
    },
    lambda fields: {
        "dropout": fields.frod_dropout,
        "density": fields.sparse_rate,
        "ridge": fields.regularization_alpha,
    },
    bias="frod_only",
    shared={
        "v": same("frod_V.{group}"),
        "places": SlotForm("frod_s_indices.{group}", lambda places: places.astype(np.int64)),
        "size": same("frod_s_size.{group}"),
    },
    derived=_inverse,
    pooled=True,
    group=_category,
    packed_shared=_with_size,
    of_base=_first_values,
)
