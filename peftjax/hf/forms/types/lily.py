"""PEFT's files of LILY."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, one_rank
from peftjax.hf.forms.form import Arrays, Form, same


@dataclass(frozen=True)
class _Lily:
    r: Count = 32
    stride_A: Count = 1
    num_B: Annotated[int, Meta(ge=2)] = 2
    scaling: float = 1.0
    init_weights: bool = True
    target_modules: str | list[str] | None = None


def _lily_options(fields: _Lily) -> dict[str, Any]:
    if isinstance(fields.target_modules, str):
        raise PeftError(
            f"target_modules is the pattern {fields.target_modules!r}, by which PEFT shares factors between "
            "modules of all names; write the names as a list where each has factors of its own"
        )
    return {
        "rank": fields.r,
        "stride": fields.stride_A,
        "experts": fields.num_B,
        "scale": fields.scaling,
    }


def _with_shared(arrays: Arrays, shared: Arrays, options: Mapping[str, Any]) -> Arrays:
    """The factors beside each module, as PEFT writes them."""
    b = shared["b"]
    return {"router": arrays["router"], "a": shared["a"][arrays["group"]], "b": b.reshape(-1, b.shape[-1])}


def _apart(modules: Sequence[Arrays], shared: Arrays, fields: _Lily) -> Arrays:
    """The factors of all modules of one name, each once."""
    first = modules[:: fields.stride_A]
    for number, own in enumerate(modules):
        of_group = first[number // fields.stride_A]["a"]
        if not np.array_equal(own["a"], of_group) or not np.array_equal(own["b"], first[0]["b"]):
            raise PeftError(
                f"of {len(modules)} modules of one name number {number} has factors of its own, and with a "
                f"stride_A of {fields.stride_A} PEFT shares them: target_modules must be ends of names"
            )
    b = first[0]["b"]
    return {"a": np.stack([own["a"] for own in first]), "b": b.reshape(fields.num_B, -1, b.shape[-1])}


def _ends(modules: Mapping[str, Arrays]) -> dict[str, Any]:
    """The ends of the modules' names, by which PEFT tells which ones share factors, and their layers."""
    layers: dict[str, list[int]] = {}
    for module in modules:
        found = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+?)", module)
        end, layer = (module, []) if found is None else (found[2], [int(found[1])])
        layers.setdefault(end, []).extend(layer)
    for end in layers:
        if other := next((own for own in layers if own != end and end.endswith(own)), None):
            raise PeftError(
                "PEFT finds out which modules share factors by the ends of their names, and "
                f"{other!r} is one of {end!r} too; export them apart"
            )
    numbers = [sorted(own) for own in layers.values() if own]
    if any(own != numbers[0] for own in numbers):
        raise PeftError("PEFT's LILY adapts the same layers of all modules; export them apart")
    return {"target_modules": sorted(layers), "layers_to_transform": numbers[0] if numbers else None}


LILY = Form(
    "lily",
    "LILY",
    {
        "a": same("lily_A.weight"),
        "b": same("lily_B.weight"),
        "router": same("lily_router.weight"),
    },
    _Lily,
    lambda options: {
        "r": one_rank(options, "LILY"),
        "stride_A": options["stride"],
        "num_B": options["experts"],
        "scaling": options["scale"],
    },
    _lily_options,
    of_modules=_ends,
    packed=_with_shared,
    derived=_apart,
    pooled=True,
)
