"""PEFT's files of LN_TUNING."""

from __future__ import annotations

from peftjax.hf.forms.form import Form, same

LN_TUNING = Form(
    "ln_tuning",
    "LN_TUNING",
    {"weight": same("ln_tuning_layers.weight"), "bias": same("ln_tuning_layers.bias")},
    as_they_are=True,
)
