"""PEFT's files of LORA with `alora_invocation_tokens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from peftjax.hf.forms.types._lora import LoraFields, variant

_Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]


@dataclass(frozen=True, kw_only=True)
class _Alora(LoraFields):
    alora_invocation_tokens: list[_Token]


ALORA = variant(
    "alora",
    "alora_invocation_tokens",
    _Alora,
    lambda options: {"alora_invocation_tokens": list(options["invocation_tokens"])},
    lambda fields: {"invocation_tokens": fields.alora_invocation_tokens},
)
