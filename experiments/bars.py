"""Bars of the memory of a step, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = ("weights", "method_state", "trainable", "optimizer", "temporaries")
COLORS = dict(zip(KINDS, ("#4c566a", "#8fa1b3", "#1b6ca8", "#7fb3d5", "#c8553d")))


def stacked_bars(axis: Any, plans: Mapping[str, Mapping[str, Any]], unit: int) -> None:
    """A bar for every plan, the first on top, in `unit` bytes."""
    names = list(plans)
    left = [0.0] * len(names)
    for kind in KINDS:
        sizes = [plans[name]["bytes"][kind] / unit for name in names]
        axis.barh(names, sizes, left=left, color=COLORS[kind], label=kind.replace("_", " "))
        left = [start + size for start, size in zip(left, sizes)]
    axis.invert_yaxis()
