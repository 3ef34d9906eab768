"""PEFT's files of C3A."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peftjax.hf.forms.fields import Count
from peftjax.hf.forms.form import Form, SlotForm


@dataclass(frozen=True)
class _C3a:
    block_size: Count = 256
    block_size_pattern: dict[str, Count] | None = None
    init_weights: bool | str | None = "xavier_uniform"


def _blocks_exchanged(kernel: np.ndarray) -> np.ndarray:
    return kernel.swapaxes(0, 1)


C3A = Form(
    "c3a",
    "C3A",
    {"kernel": SlotForm("c3a_kernel", _blocks_exchanged, _blocks_exchanged)},
    _C3a,
    bias="c3a_only",
    of_arrays=lambda arrays: {"block": arrays["kernel"].shape[-1]},
    patterned={"block": ("block_size", "block_size_pattern")},
)
