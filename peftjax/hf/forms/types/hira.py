"""PEFT's files of HIRA."""

from __future__ import annotations

from dataclasses import dataclass

from peftjax.hf.forms.fields import Count, Rate, rank_of
from peftjax.hf.forms.form import Form, SlotForm, SlotForms, same, transposed
from peftjax.hf.forms.kinds import Kernel


@dataclass(frozen=True)
class _Hira:
    r: Count = 32
    rank_pattern: dict[str, Count] | None = None
    hira_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True


def _of_convolution(forms: SlotForms, kernel: Kernel) -> SlotForms:
    ones = (1,) * len(kernel.window)
    return {
        "a": SlotForm("hira_A", kernel.written, lambda v: kernel.read(v, 1)),
        "b": SlotForm("hira_B", lambda b: b.T.reshape(*b.T.shape, *ones), lambda b: b.reshape(b.shape[:2]).T),
    }


def _of_table(forms: SlotForms, kernel: Kernel) -> SlotForms:
    return {"a": same("hira_embedding_A"), "b": transposed("hira_embedding_B")}


HIRA = Form(
    "hira",
    "HIRA",
    {"a": same("hira_A"), "b": transposed("hira_B")},
    _Hira,
    lambda options: {"hira_dropout": options["dropout"]},
    lambda fields: {"dropout": fields.hira_dropout},
    rank=rank_of("a"),
    kinds={"convolution": _of_convolution, "embedding": _of_table},
)
