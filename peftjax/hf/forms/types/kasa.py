"""PEFT's files of LORA with `kasa_config`."""

from __future__ import annotations

from dataclasses import dataclass

from peftjax.hf.forms.fields import Positive
from peftjax.hf.forms.form import same
from peftjax.hf.forms.types._lora import FACTORS, LoraFields, variant


@dataclass(frozen=True)
class _Config:
    beta: Positive = 1e-4
    gamma: Positive = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Kasa(LoraFields):
    kasa_config: _Config


KASA = variant(
    "kasa",
    "kasa_config",
    _Kasa,
    lambda options: {"kasa_config": {name: options[name] for name in ("beta", "gamma")}},
    lambda fields: vars(fields.kasa_config),
    slots={**FACTORS, "d": same("lora_diag")},
)
