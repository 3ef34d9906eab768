"""PEFT's files of LORA with `monteclora_config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Positive
from peftjax.hf.forms.form import Arrays, Options, same
from peftjax.hf.forms.types._lora import FACTORS, LoraFields, variant

SAMPLER = "lora_monteclora_sampler"


@dataclass(frozen=True)
class _Config:
    num_samples: Count = 8
    use_entropy: bool = False
    dirichlet_prior: Annotated[float, Meta(gt=0)] = 0.1
    sample_scaler: Positive = 1e-4
    kl_loss_weight: Positive = 1e-5
    buffer_size: Count = 150


@dataclass(frozen=True, kw_only=True)
class _Monteclora(LoraFields):
    monteclora_config: _Config


def _config(options: Options) -> dict[str, object]:
    return {
        "monteclora_config": {
            "num_samples": options["samples"],
            "use_entropy": False,
            "dirichlet_prior": options["concentration"],
            "sample_scaler": options["noise"],
            "kl_loss_weight": options["kl"],
        }
    }


def _options(fields: _Monteclora) -> dict[str, object]:
    config = fields.monteclora_config
    if config.use_entropy:
        raise PeftError(
            "the file has use_entropy, a penalty on drawn weights that monteclora does not have; set it to "
            "false in monteclora_config to read the adapter without it"
        )
    return {
        "samples": config.num_samples,
        "concentration": config.dirichlet_prior,
        "noise": config.sample_scaler,
        "kl": config.kl_loss_weight,
    }


def _with_last_draw(arrays: Arrays, shared: Arrays, options: Options) -> Arrays:
    """The arrays, and what PEFT has drawn last, as before its first step."""
    count, rank = len(arrays["c"]), len(arrays["t"])
    drawn = {"mixed": np.full(count, 1.0 / count, np.float32), "variance": np.eye(rank, dtype=np.float32)}
    return {**arrays, **drawn}


MONTECLORA = variant(
    "monteclora",
    "monteclora_config",
    _Monteclora,
    _config,
    _options,
    slots={
        **FACTORS,
        "t": same(f"{SAMPLER}.std_prior"),
        "c": same(f"{SAMPLER}.expert_weights_prior"),
        "mixed": same(f"{SAMPLER}.expert_weights"),
        "variance": same(f"{SAMPLER}.gaussian_var_prior"),
    },
    packed=_with_last_draw,
)
