"""What the fields of several types have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.form import Arrays

Rate = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Steps = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, le=2**31 - 1)]


def no_dropout(fields: Any, *names: str) -> None:
    """Raise a PeftError for a kind of dropout that the method has not here."""
    for name in names:
        if getattr(fields, name):
            raise PeftError(
                f"the file has {name} {getattr(fields, name)}, which the method does not have here; set it "
                "to 0 in the configuration to read the adapter without it"
            )


def rank_of(slot: str) -> Callable[[Arrays], int]:
    """The rank of a module, by the first axis of one of its arrays."""
    return lambda arrays: len(arrays[slot])


def one_rank(options: Mapping[str, Any], type: str) -> int:
    """The rank of all modules; raises a PeftError where PEFT's type has no pattern for the ranks of some."""
    if options["rank_pattern"]:
        raise PeftError(f"PEFT's {type} has one rank for all weights; train without rank_pattern")
    return options["rank"]
