"""Models, methods and machines: the cells of the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import peftjax as pj
from experiments.harness.contenders import Contender
from experiments.harness.memory import Model
from experiments.step_memory.models import llama_model
from peftjax.models.named import named_config

LENGTH = 4096
REMAT = "nothing_saveable"
MODELS = ("Llama-3-8B", "Llama-3-70B")


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine.

    Attributes:
        label: in the tables.
        name: as of `pj.plan`.
        devices: that the step is for.
    """

    label: str
    name: str
    devices: int

    @property
    def mesh(self) -> str | None:
        """All devices on `fsdp`."""
        return f"fsdp={self.devices}" if self.devices > 1 else None


TARGETS = (
    Target("one H200", "h200", 1),
    Target("8 H200", "h200:8", 8),
    Target("v5e-16", "v5e:4x4", 16),
    Target("v5p-128", "v5p:4x4x4", 64),  # which counts cores, two a chip
    Target("v5e-256", "v5e:16x16", 256),
)
SLICES = (
    Target("v5e-1", "v5e:2x2", 1),
    Target("v5e-4", "v5e:2x2", 4),
    TARGETS[2],
    Target("v5e-64", "v5e:8x8", 64),
    TARGETS[4],
)
"""For weak scaling."""


def on(model: str, target: Target, rows: int = 1) -> Model:
    """A model on a machine, with so many rows for each device, in bfloat16."""
    found = llama_model(
        f"{model} on {target.label}", named_config(model.lower()), rows * target.devices, LENGTH
    )
    return dataclasses.replace(found, target=target.name, mesh=target.mesh)


def _contender(label: str, method: Callable[[], pj.Transform], remat: str | None = REMAT) -> Contender:
    return Contender(label, lambda setting: method(), remat=remat)


def _on_nf4(method: Callable[[], pj.Transform]) -> pj.Transform:
    return pj.chain(pj.nf4(), method())


LORA: Callable[[], Any] = partial(pj.lora, rank=16)
GALORE: Callable[[], Any] = partial(
    pj.galore, rank=1024, dtype="bfloat16", together=1, basis="auto", write="step"
)
METHODS = (
    _contender("LoRA", LORA),
    _contender("QLoRA", partial(_on_nf4, LORA)),
    _contender("MEFT", pj.meft, remat=None),
    _contender("LST", pj.lst),
    _contender("GaLore", GALORE),
)
NO_REMAT = _contender("LoRA, no remat", LORA, remat=None)
PUBLISHED = on("Llama-3-8B", Target("one H100", "h100", 1), rows=2)
"""What a rate is published of: 2 rows, nothing recomputed."""
