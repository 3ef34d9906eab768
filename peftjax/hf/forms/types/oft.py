"""PEFT's files of OFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from peftjax.hf.forms.fields import Count, Rate, no_dropout
from peftjax.hf.forms.form import Form, negative, same
from peftjax.hf.forms.kinds import pointwise


@dataclass(frozen=True)
class _Oft:
    r: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    oft_block_size: Annotated[int, Meta(ge=0, le=1_000_000)] = 32
    module_dropout: Rate = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Count = 5
    fan_in_fan_out: bool = False
    init_weights: bool = True


def _oft_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    values = {"r": 0, "oft_block_size": options["block"], "block_share": options["shared"]}
    values |= {"use_cayley_neumann": options["terms"] is not None, "coft": options["radius"] is not None}
    values |= {} if options["terms"] is None else {"num_cayley_neumann_terms": options["terms"]}
    return values | ({} if options["radius"] is None else {"eps": options["radius"]})


def _oft_options(fields: _Oft) -> dict[str, Any]:
    no_dropout(fields, "module_dropout")
    return {
        "terms": fields.num_cayley_neumann_terms if fields.use_cayley_neumann else None,
        "shared": fields.block_share,
        "radius": fields.eps if fields.coft else None,
    }


def size_of_skew(entries: np.ndarray) -> int:
    """B by the b(b - 1)/2 entries of a block."""
    return round((1 + (1 + 8 * entries.shape[-1]) ** 0.5) / 2)


OFT = Form(
    "oft",
    "OFT",
    {"skew": same("oft_R.weight")},
    _Oft,
    _oft_fields,
    _oft_options,
    # PEFT's exact rotation turns the other way than its series.
    with_fields=lambda slots, fields: (
        slots if fields.use_cayley_neumann else {"skew": negative(slots["skew"])}
    ),
    kinds={"convolution": pointwise},
    of_arrays=lambda arrays: {"block": size_of_skew(arrays["skew"])},
)
