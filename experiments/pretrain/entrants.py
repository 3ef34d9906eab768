"""Who takes part in the pre-training comparison: a method and its optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import optax

import peftjax as pj
from experiments.pretrain.loop import Optimizer
from experiments.pretrain.per_matrix import per_matrix

BESIDE_LORA = r".*(embedding|norm/scale|head/output/kernel)"
"""What is trained as it is where the matrices of the blocks are not: embedding, norms, output layer."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """What the low-rank methods share.

    Attributes:
        rank: of factors and projections.
        every: steps between projections or restarts.
        scale: of a projected step, "alpha" in GaLore's paper.
        steps: of the run.
    """

    rank: int
    every: int
    scale: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One line of the table.

    Attributes:
        label: its name there.
        method: the method for the given sizes.
        optimizer: of a learning-rate schedule; AdamW without weight decay where nothing else is said.
    """

    label: str
    method: Callable[[Projection], pj.Transform]
    optimizer: Callable[[Projection], Optimizer] = lambda sizes: adamw


def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW without weight decay."""
    return optax.adamw(rate, weight_decay=0.0)


def full(sizes: Projection) -> pj.Transform:
    """All parameters."""
    return pj.full()


def with_rest(method: pj.Transform) -> pj.Transform:
    """A method of the blocks' matrices, and plain training of all else."""
    return pj.chain(method, pj.train(BESIDE_LORA))


def optax_galore(sizes: Projection) -> Optimizer:
    """`optax.contrib.galore`, each matrix by itself."""
    return lambda rate: per_matrix(rate, rank=sizes.rank, every=sizes.every, scale=sizes.scale)


ENTRANTS = (
    Entrant("AdamW", full),
    Entrant("optax.contrib.galore", full, optax_galore),
    Entrant("LoRA", lambda sizes: with_rest(pj.lora(rank=sizes.rank, alpha=sizes.rank))),
)
