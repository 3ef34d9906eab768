"""PEFT's files of LORA with `use_bdlora`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftjax.core.targets import pattern_value
from peftjax.hf.forms.fields import Count
from peftjax.hf.forms.form import Arrays, Options
from peftjax.hf.forms.types._lora import LoraFields, variant

SIDES = ("inputs", "outputs", "none")
FIELDS = {"inputs": "target_modules_bd_a", "outputs": "target_modules_bd_b"}


@dataclass(frozen=True)
class _Config:
    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Count = 1
    match_strict: bool = True


@dataclass(frozen=True, kw_only=True)
class _Bdlora(LoraFields):
    use_bdlora: _Config


def _with_side(arrays: Arrays, fields: _Bdlora, module: str) -> Arrays:
    """The arrays, and the number of the side that the configuration divides."""
    config = fields.use_bdlora
    asked = {"inputs": config.target_modules_bd_a, "outputs": config.target_modules_bd_b}
    side = next((side for side, names in asked.items() if any(n in module for n in names or ())), "none")
    return {**arrays, "side": np.asarray(SIDES.index(side))}


def _side_pattern(paths: Mapping[str, Arrays]) -> dict[str, Any]:
    sides = {path: SIDES[int(arrays["side"])] for path, arrays in paths.items()}
    return {"side_pattern": {f"^{re.escape(path)}": side for path, side in sides.items()}}


def _by_name(modules: Mapping[str, tuple[str, Options]]) -> dict[str, Any]:
    """Which modules have blocks at which side: by the end of their names, or by their whole names."""
    sides = {
        name: pattern_value(path, own["side_pattern"], "outputs") for name, (path, own) in modules.items()
    }
    (blocks,) = {own["blocks"] for _, own in modules.values()}
    named = {side: [name for name, own in sides.items() if own == side] for side in FIELDS}
    short = {side: sorted({name.rpartition(".")[2] for name in names}) for side, names in named.items()}
    chosen = short if _tells_apart(short, sides) else named
    return {
        "use_bdlora": {
            **{field: chosen[side] or None for side, field in FIELDS.items()},
            "nblocks": blocks,
            "match_strict": "none" not in sides.values(),
        }
    }


def _tells_apart(names: Mapping[str, Sequence[str]], sides: Mapping[str, str]) -> bool:
    """Whether the names of each side are parts of its own modules' names alone."""
    return all(
        any(part in module for part in parts) == (own == side)
        for side, parts in names.items()
        for module, own in sides.items()
    )


BDLORA = variant(
    "bdlora",
    "use_bdlora",
    _Bdlora,
    lambda options: {"use_bdlora": {"nblocks": options["blocks"]}},
    lambda fields: {"blocks": fields.use_bdlora.nblocks},
    unpacked=_with_side,
    of_paths=_side_pattern,
    of_names=_by_name,
)
