"""PEFT's files of GLORA."""

from __future__ import annotations

from dataclasses import dataclass

from peftjax.hf.forms.fields import Count
from peftjax.hf.forms.form import Arrays, Form, SlotForms, column, same, transposed
from peftjax.methods.structured.glora import Coupling, OfBiases, OfWeights


@dataclass(frozen=True)
class _Glora:
    r: Count = 8
    config_A_B: OfWeights = "lora"
    config_C: Coupling = "lora"
    config_D_E: OfBiases = "constant"
    init_weights: bool = True


def _held(slots: SlotForms, tensors: Arrays) -> list[str]:
    """What the file has of a module, which has fewer without a bias."""
    return [own for own, slot in slots.items() if slot.name in tensors]


def _glora_slots(slots: SlotForms, fields: _Glora) -> SlotForms:
    """Those of the fields' forms; PEFT calls numbers of all forms alike."""
    vector = column if fields.config_A_B == "vector" else same
    return {**slots, "scale": vector("glora_A.X"), "add": vector("glora_B.X")}


GLORA = Form(
    "glora",
    "GLORA",
    {
        "scale_a": same("glora_A.Xu"),
        "scale_b": transposed("glora_A.Xd"),
        "add_a": same("glora_B.Xu"),
        "add_b": transposed("glora_B.Xd"),
        "scale": same("glora_A.X"),
        "add": same("glora_B.X"),
        "inner_u": column("glora_C.Xu"),
        "inner_v": transposed("glora_C.Xd"),
        "inner": column("glora_C.X"),
        "gain": same("glora_D.X"),
        "shift": same("glora_E.X"),
    },
    _Glora,
    lambda options: {
        "config_A_B": options["weights"],
        "config_C": options["coupling"],
        "config_D_E": options["biases"],
    },
    lambda fields: {
        "weights": fields.config_A_B,
        "coupling": fields.config_C,
        "biases": fields.config_D_E,
    },
    rank=lambda arrays: next((len(arrays[slot]) for slot in ("scale_a", "inner_v") if slot in arrays), None),
    bias="glora_only",
    present=_held,
    with_fields=_glora_slots,
    unread=tuple(f"glora_{part}.zeros" for part in "ABCDE"),
)
