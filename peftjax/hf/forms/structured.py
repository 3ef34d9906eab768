"""PEFT's files of the methods in `peftjax/methods/structured`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, no_dropout, rank_of
from peftjax.hf.forms.form import Arrays, Form, SlotForms, column, negative, row, same, transposed


@dataclass(frozen=True)
class _Ia3:
    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True


def _sides(slots: SlotForms, tensors: Arrays) -> list[str]:
    return ["input" if tensors["ia3_l"].shape[0] == 1 else "output"]


def _entering(paths: Mapping[str, Arrays]) -> list[str]:
    return [path for path, arrays in paths.items() if "input" in arrays]


IA3 = Form(
    "ia3",
    "IA3",
    {"output": column("ia3_l"), "input": row("ia3_l")},
    _Ia3,
    present=_sides,
    of_modules=lambda modules: {"feedforward_modules": sorted(_entering(modules))},
    of_paths=lambda paths: {"inputs": "|".join(map(re.escape, _entering(paths))) or None},
)


@dataclass(frozen=True)
class _Loha:
    r: Count = 8
    alpha: float = 8.0
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True


def _loha_options(fields: _Loha) -> dict[str, Any]:
    no_dropout(fields, "rank_dropout", "module_dropout")
    return {}


LOHA = Form(
    "loha",
    "LOHA",
    {
        "a1": same("hada_w1_b"),
        "b1": transposed("hada_w1_a"),
        "a2": same("hada_w2_b"),
        "b2": transposed("hada_w2_a"),
    },
    _Loha,
    to_options=_loha_options,
    rank=rank_of("a1"),
    alpha=("alpha", "alpha_pattern"),
)


@dataclass(frozen=True)
class _Hira:
    r: Count = 32
    rank_pattern: dict[str, Count] | None = None
    hira_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True


HIRA = Form(
    "hira",
    "HIRA",
    {"a": same("hira_A"), "b": transposed("hira_B")},
    _Hira,
    lambda options: {"hira_dropout": options["dropout"]},
    lambda fields: {"dropout": fields.hira_dropout},
    rank=rank_of("a"),
)


@dataclass(frozen=True)
class _Miss:
    r: Count = 64
    mini_r: Count = 1
    miss_dropout: Rate = 0.0
    init_weights: bool | str = True


def _miss_options(fields: _Miss) -> dict[str, Any]:
    if fields.init_weights == "bat":
        raise PeftError("the file is of MiSS with init_weights 'bat', which peftjax has not")
    width = fields.mini_r if fields.init_weights == "mini" else None
    return {"dropout": fields.miss_dropout, "width": width}


MISS = Form(
    "miss",
    "MISS",
    {"block": same("miss_block")},
    _Miss,
    lambda options: (
        {"miss_dropout": options["dropout"]}
        | ({} if options["width"] is None else {"mini_r": options["width"], "init_weights": "mini"})
    ),
    _miss_options,
    rank=rank_of("block"),
)


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


def _block(arrays: Arrays) -> dict[str, Any]:
    """B by the b(b - 1)/2 entries of a block."""
    return {"block": round((1 + (1 + 8 * arrays["skew"].shape[-1]) ** 0.5) / 2)}


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
    of_arrays=_block,
)

STRUCTURED = (IA3, LOHA, HIRA, MISS, OFT)
