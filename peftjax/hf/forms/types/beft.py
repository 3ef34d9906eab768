"""PEFT's files of BEFT."""

from __future__ import annotations

from dataclasses import dataclass

from peftjax.hf.forms.form import Form, row


@dataclass(frozen=True)
class _Beft:
    init_weights: bool = True


BEFT = Form("beft", "BEFT", {"shift": row("beft_bias")}, _Beft)
