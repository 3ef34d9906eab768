"""PEFT's files of BOFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from peftjax.hf.forms.fields import Count, Rate, no_dropout
from peftjax.hf.forms.form import Arrays, Form, SlotForm, SlotForms, column, row
from peftjax.hf.forms.kinds import Kernel, pointwise
from peftjax.hf.forms.types.oft import size_of_skew


@dataclass(frozen=True)
class _Boft:
    boft_block_size: Annotated[int, Meta(ge=0, le=1_000_000)] = 4
    boft_block_num: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    boft_n_butterfly_factor: Count = 1
    boft_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True


def _boft_options(fields: _Boft) -> dict[str, Any]:
    no_dropout(fields, "boft_dropout")
    return {}


def _whole_skew(entries: np.ndarray) -> np.ndarray:
    """PEFT's matrices, of which it takes the skew part, and which turn the other way."""
    size = size_of_skew(entries)
    upper = np.zeros((*entries.shape[:-1], size, size), entries.dtype)
    upper[..., *np.triu_indices(size, 1)] = -entries
    return upper - _transposed(upper)


def _entries_of_skew(whole: np.ndarray) -> np.ndarray:
    size = whole.shape[-1]
    return 0.5 * (_transposed(whole) - whole)[..., *np.triu_indices(size, 1)]


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return matrices.swapaxes(-1, -2)


def _rounds(arrays: Arrays) -> dict[str, Any]:
    return {"block": size_of_skew(arrays["skew"]), "rounds": len(arrays["skew"])}


def _of_convolution(forms: SlotForms, kernel: Kernel) -> SlotForms:
    return {**pointwise(forms, kernel), "scale": row("boft_s")}


BOFT = Form(
    "boft",
    "BOFT",
    {"skew": SlotForm("boft_R", _whole_skew, _entries_of_skew), "scale": column("boft_s")},
    _Boft,
    lambda options: {
        "boft_block_size": options["block"],
        "boft_block_num": 0,
        "boft_n_butterfly_factor": options["rounds"],
    },
    _boft_options,
    bias="boft_only",
    of_arrays=_rounds,
    kinds={"convolution": _of_convolution},
)
