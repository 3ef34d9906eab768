"""PEFT's files of OSF."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftjax.hf.forms.form import Arrays, Form, same, transposed


@dataclass(frozen=True)
class _Osf:
    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    target_svd_config: dict[str, int] | None = None
    init_weights: bool = True


def _preserved(arrays: Arrays) -> tuple[int, int]:
    """How many directions stay, and how many there are."""
    sides = arrays["u"].shape[-1], arrays["v"].shape[-1]
    return min(sides) - len(arrays["s"]), min(sides)


def _osf_ranks(modules: Mapping[str, Arrays]) -> dict[str, Any]:
    ranks = {f"^{re.escape(module)}": _preserved(arrays) for module, arrays in modules.items()}
    return {"rank_pattern": {name: kept for name, (kept, of) in ranks.items() if kept != of // 2}}


def _osf_preserved(arrays: Arrays) -> dict[str, Any]:
    kept, of = _preserved(arrays)
    return {} if kept == of // 2 else {"preserved": kept}


OSF = Form(
    "osf",
    "OSF",
    {
        "u": same("osf_svd_params.V_low"),
        "s": same("osf_svd_params.S_low"),
        "v": transposed("osf_svd_params.U_low"),
    },
    _Osf,
    of_modules=_osf_ranks,
    of_arrays=_osf_preserved,
)
