"""PEFT's files of PEANUT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_args

from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, rank_of
from peftjax.hf.forms.form import Form, SlotForms, same, transposed
from peftjax.methods.structured.peanut import Activation, layers_at


@dataclass(frozen=True)
class _Peanut:
    r: Count = 32
    depth: Annotated[int, Meta(ge=0, le=1000)] = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True


def _network(slots: SlotForms, fields: _Peanut) -> SlotForms:
    """The arrays of a network of so many layers."""
    found = dict(slots)
    for number in range(fields.depth):
        entering, leaving = layers_at(number)
        found[entering] = transposed(f"peanut_encoders.{number}.weight")
        found[leaving] = transposed(f"peanut_decoders.{number}.weight")
    return found


def _peanut_options(fields: _Peanut) -> dict[str, Any]:
    if fields.act_fn not in (known := get_args(Activation)):
        raise PeftError(
            f"the file is of PEANuT with act_fn {fields.act_fn!r}, and peftjax has {', '.join(known)}; "
            "merge it in PEFT, or train it with one of these"
        )
    return {"depth": fields.depth, "activation": fields.act_fn, "scale": fields.scaling}


PEANUT = Form(
    "peanut",
    "PEANUT",
    {"a": same("peanut_A.weight"), "b": transposed("peanut_B.weight")},
    _Peanut,
    lambda options: {
        "depth": options["depth"],
        "act_fn": options["activation"],
        "scaling": options["scale"],
    },
    _peanut_options,
    rank=rank_of("a"),
    with_fields=_network,
)
