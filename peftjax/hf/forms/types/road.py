"""PEFT's files of ROAD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftjax.hf.forms.fields import Count
from peftjax.hf.forms.form import Form, same


@dataclass(frozen=True)
class _Road:
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Count = 64
    init_weights: bool = True


ROAD = Form(
    "road",
    "ROAD",
    {"theta": same("road_theta"), "alpha": same("road_alpha")},
    _Road,
    lambda options: {"variant": f"road_{options['variant']}", "group_size": options["group"]},
    lambda fields: {"variant": int(fields.variant.removeprefix("road_")), "group": fields.group_size},
)
