"""PEFT's files of SUPERTUNING."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate
from peftjax.hf.forms.form import Form, SlotForms, same, transposed


@dataclass(frozen=True)
class _Supertuning:
    sparsity: Rate = 0.99
    select_top: bool = True
    r: Count | None = None
    lora_alpha: float | None = None
    lora_dropout: Rate = 0.0
    save_precomputed_indices: bool = True
    init_weights: bool = True


def _supra(slots: SlotForms, fields: _Supertuning) -> SlotForms:
    if not fields.save_precomputed_indices:
        raise PeftError(
            "the file was saved without the indices of its entries, which are chosen anew from the base "
            "where it is read, and ties may be chosen otherwise; save it with save_precomputed_indices=True"
        )
    return slots if fields.r else {slot: slots[slot] for slot in ("values", "indices")}


def _supertuning_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"sparsity": options["sparsity"], "select_top": options["largest"]}
    if options["rank"] is None:
        return fields
    alpha = 2.0 * options["rank"] if options["alpha"] is None else options["alpha"]
    return fields | {"r": options["rank"], "lora_alpha": alpha, "lora_dropout": options["dropout"]}


SUPERTUNING = Form(
    "supertuning",
    "SUPERTUNING",
    {
        "values": same("supertuning_values"),
        "indices": same("supertuning_indices"),
        "a": same("supertuning_lora_A.weight"),
        "b": transposed("supertuning_lora_B.weight"),
    },
    _Supertuning,
    _supertuning_fields,
    lambda fields: {
        "sparsity": fields.sparsity,
        "largest": fields.select_top,
        "rank": fields.r,
        "alpha": fields.lora_alpha if fields.r else None,
        "dropout": fields.lora_dropout if fields.r else 0.0,
    },
    with_fields=_supra,
)
