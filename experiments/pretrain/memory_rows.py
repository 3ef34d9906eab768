"""The rows of the memory table: a method and its optimizer, for the sizes of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import optax

import peftjax as pj
from experiments.pretrain.entrants import Projection, adamw, full, optax_galore, with_rest

RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One line of a table.

    Attributes:
        name: in the table.
        method: for the sizes of a model.
        optimizer: what the method's hook is given.
    """

    name: str
    method: Callable[[Projection], pj.Transform]
    optimizer: Callable[[Projection], optax.GradientTransformation] = lambda sizes: adamw(RATE)


def optax_as_it_is(sizes: Projection) -> optax.GradientTransformation:
    """`optax.contrib.galore` on the stacked parameters."""
    return optax.contrib.galore(RATE, rank=sizes.rank, update_proj_gap=sizes.every, scale=sizes.scale)


ROWS = (
    MemoryRow("AdamW", full),
    MemoryRow("optax.contrib.galore, as it is", full, optax_as_it_is),
    MemoryRow("optax.contrib.galore, per matrix", full, lambda sizes: optax_galore(sizes)(RATE)),
    MemoryRow("LoRA", lambda sizes: with_rest(pj.lora(rank=sizes.rank, alpha=sizes.rank))),
)
