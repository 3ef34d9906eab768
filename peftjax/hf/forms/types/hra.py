"""PEFT's files of HRA."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, rank_of
from peftjax.hf.forms.form import Form, SlotForm, transposed
from peftjax.hf.forms.kinds import flat_inputs


@dataclass(frozen=True)
class _Hra:
    r: Count = 8
    apply_GS: bool = False
    init_weights: bool = True


def _no_start(start: np.ndarray) -> np.ndarray:
    """Raise a PeftError for reflections of the start, which PEFT's files have not."""
    if start.any():
        raise PeftError(
            "hra: with `orthogonal` the weights are reflected back in the directions of the start, which "
            "PEFT's HRA does not do; merge the adapter instead of exporting it"
        )
    return start.T


HRA = Form(
    "hra",
    "HRA",
    # The start first: the directions are written over it.
    {"start": SlotForm("hra_u", _no_start, lambda u: np.zeros_like(u.T)), "u": transposed("hra_u")},
    _Hra,
    lambda options: {"apply_GS": options["orthogonal"]},
    lambda fields: {"orthogonal": fields.apply_GS},
    rank=rank_of("u"),
    bias="hra_only",
    kinds={"convolution": flat_inputs("u", "start")},
    with_fields=lambda slots, fields: slots if fields.apply_GS else {"u": slots["u"]},
)
