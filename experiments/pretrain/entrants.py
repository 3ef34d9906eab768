"""Who takes part in the pre-training comparison: a method and its optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

import peftjax as pj
from experiments.pretrain.loop import Optimizer
from experiments.pretrain.per_matrix import STACK_AXES, per_matrix

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
    return pj.chain(method, pj.unfreeze(BESIDE_LORA))


def lora(sizes: Projection) -> pj.Transform:
    """LoRA of scale 1."""
    return with_rest(pj.lora(rank=sizes.rank, alpha=sizes.rank))


def galore(sizes: Projection, **options: Any) -> pj.Transform:
    """GaLore with the sizes and other options, bases by singular value decomposition if they name none."""
    return pj.galore(rank=sizes.rank, every=sizes.every, scale=sizes.scale, **{"basis": "svd", **options})


def natural_galore(sizes: Projection, **options: Any) -> pj.Transform:
    """Natural GaLore with the sizes and other options; bases as in `galore`."""
    return pj.natural_galore(
        rank=sizes.rank, every=sizes.every, scale=sizes.scale, **{"basis": "svd", **options}
    )


def restarts(sizes: Projection) -> pj.Transform:
    """Low-rank restarts."""
    return pj.lowrank_restarts(rank=sizes.rank, every=sizes.every)


def switchlora(sizes: Projection) -> pj.Transform:
    """SwitchLoRA, whose exchanges have a rhythm of their own."""
    return pj.switchlora(total_steps=sizes.steps, rank=sizes.rank)


def optax_galore(sizes: Projection) -> Optimizer:
    """`optax.contrib.galore`, each matrix by itself."""
    return lambda rate: per_matrix(rate, rank=sizes.rank, every=sizes.every, scale=sizes.scale)


def scaled_matrices(sizes: Projection) -> Optimizer:
    """AdamW whose steps of the blocks' matrices are scaled as those of projected methods are.

    The control for what is not the projection: GaLore's learning rate is another one for the matrices than
    for embedding, norms and output layer.
    """

    def scaled(updates: dict[str, jax.Array], _: Any) -> dict[str, jax.Array]:
        return {path: sizes.scale * u if u.ndim == STACK_AXES else u for path, u in updates.items()}

    return lambda rate: optax.chain(adamw(rate), optax.stateless(scaled))


def adamw8bit(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW with moments of eight bits."""
    return pj.optim.eight_bit(adamw(rate))


def lion8bit(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Lion with momentum of eight bits."""
    return pj.optim.eight_bit(optax.lion(rate, weight_decay=0.0))


def row_adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW with a step count for each row, as SwitchLoRA's authors use it."""
    return pj.optim.row_adamw(rate, weight_decay=0.0)


ENTRANTS = (
    Entrant("AdamW", full),
    Entrant("AdamW, matrices scaled", full, scaled_matrices),
    Entrant("8-bit AdamW", full, lambda sizes: adamw8bit),
    Entrant("GaLore", galore),
    Entrant("8-bit GaLore", galore, lambda sizes: adamw8bit),
    Entrant("GaLore, moments rotated", partial(galore, moments="rotate")),
    Entrant("GaLore, moments reset", partial(galore, moments="reset")),
    Entrant("Natural GaLore", natural_galore),
    Entrant("optax.contrib.galore", full, optax_galore),
    Entrant("LoRA", lora),
    Entrant("low-rank restarts", restarts),
    Entrant("SwitchLoRA", switchlora, lambda sizes: row_adamw),
)
