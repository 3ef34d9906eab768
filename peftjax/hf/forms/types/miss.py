"""PEFT's files of MISS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftjax.hf.forms.fields import Count, Rate, rank_of
from peftjax.hf.forms.form import Form, same


@dataclass(frozen=True)
class MissFields:
    """Those of MiSS in all of its forms."""

    r: Count = 64
    mini_r: Count = 1
    miss_dropout: Rate = 0.0
    init_weights: bool | str = True


def _miss_options(fields: MissFields) -> dict[str, Any]:
    width = fields.mini_r if fields.init_weights == "mini" else None
    return {"dropout": fields.miss_dropout, "width": width}


MISS = Form(
    "miss",
    "MISS",
    {"block": same("miss_block")},
    MissFields,
    lambda options: (
        {"miss_dropout": options["dropout"]}
        | ({} if options["width"] is None else {"mini_r": options["width"], "init_weights": "mini"})
    ),
    _miss_options,
    rank=rank_of("block"),
)
