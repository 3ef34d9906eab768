"""PEFT's files of LOKR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, no_dropout
from peftjax.hf.forms.form import Arrays, Form, SlotForm, SlotForms, same, transposed
from peftjax.hf.forms.kinds import Kernel, pointwise


@dataclass(frozen=True)
class _Lokr:
    r: Count = 8
    alpha: float = 8.0
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout: Rate = 0.0
    rank_dropout_scale: bool = False
    module_dropout: Rate = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True


def _lokr_options(fields: _Lokr) -> dict[str, Any]:
    no_dropout(fields, "rank_dropout", "module_dropout")
    factor = fields.decompose_factor if fields.decompose_factor > 0 else None
    return {"factor": factor, "decompose_both": fields.decompose_both}


def _parts_of(slots: SlotForms, tensors: Arrays) -> list[str]:
    """Either of the two matrices whole, or both of its factors."""
    first = ["w1"] if "lokr_w1" in tensors else ["a1", "b1"]
    return [*first, *(["w2"] if "lokr_w2" in tensors else ["a2", "b2"])]


def _lokr_rank(arrays: Arrays) -> int | None:
    return next((len(arrays[slot]) for slot in ("a1", "a2") if slot in arrays), None)


def _of_convolution(forms: SlotForms, kernel: Kernel) -> SlotForms:
    """Those of a linear layer, the second whole matrix with the axes of the window."""
    ones = (1,) * len(kernel.window)
    w2 = SlotForm("lokr_w2", lambda v: v.T.reshape(*v.T.shape, *ones), lambda v: v.reshape(v.shape[:2]).T)
    return {**pointwise(forms, kernel), "w2": w2 if len(ones) == 2 else _no_product()}


def _no_product() -> SlotForm:
    """Of a convolution in one dimension, where what PEFT adds is no Kronecker product."""

    def refuse(v: Any) -> Any:
        raise PeftError(
            "LOKR with a whole second matrix adds no Kronecker product to a convolution in one dimension in "
            "PEFT: lower the rank, leave the convolution out, or merge it"
        )

    return SlotForm("lokr_w2", refuse, refuse)


LOKR = Form(
    "lokr",
    "LOKR",
    {
        "w1": transposed("lokr_w1"),
        "a1": same("lokr_w1_b"),
        "b1": transposed("lokr_w1_a"),
        "w2": transposed("lokr_w2"),
        "a2": same("lokr_w2_b"),
        "b2": transposed("lokr_w2_a"),
    },
    _Lokr,
    lambda options: {
        "decompose_factor": -1 if options["factor"] is None else options["factor"],
        "decompose_both": options["decompose_both"],
    },
    _lokr_options,
    rank=_lokr_rank,
    alpha=("alpha", "alpha_pattern"),
    present=_parts_of,
    kinds={"convolution": _of_convolution},
)
