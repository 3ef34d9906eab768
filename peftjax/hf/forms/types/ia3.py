"""PEFT's files of IA3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from peftjax.hf.forms.form import Arrays, Form, SlotForms, column, row


@dataclass(frozen=True)
class _Ia3:
    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True


def _sides(slots: SlotForms, tensors: Arrays) -> list[str]:
    return ["input" if tensors["ia3_l"].shape[0] == 1 else "output"]


def _entering(paths: Mapping[str, Arrays]) -> list[str]:
    return [path for path, arrays in paths.items() if "input" in arrays]


IA3 = Form(
    "ia3",
    "IA3",
    {"output": column("ia3_l"), "input": row("ia3_l")},
    _Ia3,
    present=_sides,
    of_modules=lambda modules: {"feedforward_modules": sorted(_entering(modules))},
    of_paths=lambda paths: {"inputs": "|".join(map(re.escape, _entering(paths))) or None},
)
