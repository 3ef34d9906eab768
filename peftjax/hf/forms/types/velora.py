"""PEFT's files of LORA with `velora_config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from peftjax.hf.forms.fields import Count
from peftjax.hf.forms.form import Arrays, Options, same
from peftjax.hf.forms.types._lora import FACTORS, LoraFields, variant


@dataclass(frozen=True)
class _Config:
    num_groups: Count = 64
    scale: Annotated[float, Meta(gt=0)] = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"


@dataclass(frozen=True, kw_only=True)
class _Velora(LoraFields):
    velora_config: _Config


def _config(options: Options) -> dict[str, Any]:
    # PEFT keeps the direction of a file where it was drawn, and not where it is that of a first batch.
    of = {"batch": "batch_average", "fixed": "random"}[options["direction"]]
    return {"velora_config": {"num_groups": options["groups"], "scale": options["strength"], "init_type": of}}


def _with_direction(arrays: Arrays, shared: Arrays, options: Options) -> Arrays:
    """The arrays, and zeros for the direction that PEFT takes anew from each batch."""
    width = -(-arrays["a"].shape[-1] // options["groups"])
    return {"v": np.zeros(width, np.float32), **arrays}


def _read(fields: _Velora) -> dict[str, Any]:
    config = fields.velora_config
    direction = "batch" if config.init_type == "batch_average" else "fixed"
    return {"groups": config.num_groups, "strength": config.scale, "direction": direction}


VELORA = variant(
    "velora",
    "velora_config",
    _Velora,
    _config,
    _read,
    slots={**FACTORS, "v": same("lora_velora_embed")},
    packed=_with_direction,
)
