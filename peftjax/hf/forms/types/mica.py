"""PEFT's files of LORA with `init_lora_weights='mica'`, which freezes one factor."""

from __future__ import annotations

from dataclasses import replace

from peftjax.hf.forms.types._lora import FACTORS, LoraFields, variant

START = {"init_lora_weights": "mica"}
MICA = replace(
    variant("mica", "init_lora_weights", LoraFields, lambda options: START, lambda fields: {}, slots=FACTORS),
    to_options=lambda fields: {"dropout": fields.lora_dropout, "rslora": fields.use_rslora},
    variant=None,
    where=START,
)
