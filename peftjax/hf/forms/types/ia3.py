"""PEFT's files of IA3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from peftjax.core.errors import PeftError
from peftjax.hf.common import asked_for
from peftjax.hf.forms.form import Arrays, Form, SlotForm, SlotForms, column, row
from peftjax.hf.forms.kinds import Kernel


@dataclass(frozen=True)
class _Ia3:
    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True


def _sides(slots: SlotForms, tensors: Arrays) -> list[str]:
    return ["input" if "input" in slots and tensors["ia3_l"].shape[0] == 1 else "output"]


def _entering(paths: Mapping[str, Arrays]) -> list[str]:
    return [path for path, arrays in paths.items() if "input" in arrays]


def _of_convolution(forms: SlotForms, kernel: Kernel) -> SlotForms:
    """The outputs alone: PEFT has a factor for each channel of the inputs, whatever the window."""
    ones = (1,) * len(kernel.window)
    return {"output": SlotForm("ia3_l", lambda v: v.reshape(1, -1, *ones), lambda v: v.reshape(-1))}


def _outputs(arrays: Arrays, fields: _Ia3, module: str) -> Arrays:
    entering = fields.feedforward_modules
    if "output" in arrays and entering and asked_for(entering, module):
        raise PeftError(
            f"{module!r} is a convolution whose inputs are rescaled by channels, and here by the numbers of "
            "the window; merge the adapter in PEFT"
        )
    return arrays


IA3 = Form(
    "ia3",
    "IA3",
    {"output": column("ia3_l"), "input": row("ia3_l")},
    _Ia3,
    present=_sides,
    unpacked=_outputs,
    kinds={"convolution": _of_convolution},
    of_modules=lambda modules: {"feedforward_modules": sorted(_entering(modules))},
    of_paths=lambda paths: {"inputs": "|".join(map(re.escape, _entering(paths))) or None},
)
