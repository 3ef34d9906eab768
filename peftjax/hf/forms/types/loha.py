"""PEFT's files of LOHA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, no_dropout, rank_of
from peftjax.hf.forms.form import Form, same, transposed
from peftjax.hf.forms.kinds import flat_inputs


@dataclass(frozen=True)
class _Loha:
    r: Count = 8
    alpha: float = 8.0
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True


def _loha_options(fields: _Loha) -> dict[str, Any]:
    no_dropout(fields, "rank_dropout", "module_dropout")
    if fields.use_effective_conv2d:
        raise PeftError(
            "the file has use_effective_conv2d=True, a factorization of the window that LoHa has not here; "
            "merge the adapter in PEFT"
        )
    return {}


LOHA = Form(
    "loha",
    "LOHA",
    {
        "a1": same("hada_w1_b"),
        "b1": transposed("hada_w1_a"),
        "a2": same("hada_w2_b"),
        "b2": transposed("hada_w2_a"),
    },
    _Loha,
    to_options=_loha_options,
    rank=rank_of("a1"),
    alpha=("alpha", "alpha_pattern"),
    kinds={"convolution": flat_inputs("a1", "a2")},
)
