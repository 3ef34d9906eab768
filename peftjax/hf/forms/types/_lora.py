"""What the variants of LoRA have in common, which PEFT writes as LORA with a field of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, rank_of
from peftjax.hf.forms.form import Form, Options, SlotForms, same, transposed

FACTORS: SlotForms = {"a": same("lora_A.weight"), "b": transposed("lora_B.weight")}
STARTS = (True, False, "gaussian", "orthogonal")
"""Initializations that leave the base as it is."""


@dataclass(frozen=True, kw_only=True)
class LoraFields:
    """The fields of LoRA that say something of a variant's tensors, and those that never are null."""

    r: Count = 8
    lora_alpha: float = 8.0
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    lora_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    megatron_core: str | None = None
    qalora_group_size: int = 16
    layer_replication: list[list[int]] | None = None


def variant(
    method: str,
    field: str,
    fields: type[LoraFields],
    to_fields: Callable[[Options], dict[str, Any]],
    to_options: Callable[[Any], dict[str, Any]],
    *,
    slots: SlotForms = FACTORS,
    **more: Any,
) -> Form:
    """The form of a variant whose own options are in a field.

    Args:
        method: its name here.
        field: PEFT's.
        fields: those of LoRA, and it.
        to_fields: the value of that field, from our options.
        to_options: our options beside LoRA's, from the fields.
        slots: the arrays of a module.
        **more: of `Form`.
    """

    def written(options: Options) -> dict[str, Any]:
        common = {"lora_dropout": options["dropout"], "use_rslora": options["rslora"]}
        return {**common, **to_fields(options)}

    def read(given: Any) -> dict[str, Any]:
        if given.init_lora_weights not in STARTS:
            raise PeftError(
                f"init_lora_weights is {given.init_lora_weights!r}: such factors belong to a residual of the "
                f"base that is not in the file, which {method} has not"
            )
        return {"dropout": given.lora_dropout, "rslora": given.use_rslora, **to_options(given)}

    alpha = ("lora_alpha", "alpha_pattern")
    return Form(
        method,
        "LORA",
        slots,
        fields,
        written,
        read,
        rank=rank_of("a"),
        alpha=alpha,
        bias="lora_only",
        variant=field,
        **more,
    )
