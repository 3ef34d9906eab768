"""The rows of the memory table: a method and its optimizer, for the sizes of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import optax

import peftjax as pj
from experiments.pretrain.entrants import (
    Projection,
    adamw,
    adamw8bit,
    full,
    galore,
    lion8bit,
    lora,
    natural_galore,
    optax_galore,
    restarts,
    row_adamw,
    switchlora,
    with_rest,
)
from peftjax.methods.projected._projected import Write
from peftjax.optim.refresh import Method
from peftjax.transform.frozen import Frozen, Params, Trainable

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


def bfloat16_galore(
    sizes: Projection, together: int | None = 1, basis: Method = "auto", write: Write = "refresh"
) -> pj.Transform:
    """GaLore with projectors and displacements in bfloat16, new ones for a parameter at a time or for all."""
    return galore(sizes, dtype="bfloat16", together=together, basis=basis, write=write)


def written(sizes: Projection) -> pj.Transform:
    """The same, put into the weights at each step, as the authors' code does."""
    return bfloat16_galore(sizes, write="step")


def iterated(sizes: Projection) -> pj.Transform:
    """The same with bases by subspace iteration."""
    return bfloat16_galore(sizes, basis="subspace")


def bfloat16_natural(sizes: Projection) -> pj.Transform:
    """Natural GaLore with projectors, displacements and history in bfloat16."""
    return natural_galore(sizes, dtype="bfloat16", together=1, basis="auto")


def bfloat16_lora(sizes: Projection) -> pj.Transform:
    """LoRA with factors in bfloat16, as the paper counts them."""
    whole = pj.lora(rank=sizes.rank, alpha=sizes.rank)

    def init(key: jax.Array, params: Params) -> tuple[Frozen, Trainable]:
        frozen, trainable = whole.init(key, params)
        return frozen, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), trainable)

    return with_rest(dataclasses.replace(whole, init=init))


ROWS = (
    MemoryRow("AdamW", full),
    MemoryRow("8-bit AdamW", full, lambda sizes: adamw8bit(RATE)),
    MemoryRow("GaLore", bfloat16_galore),
    MemoryRow("GaLore, written at each step", written),
    MemoryRow("8-bit GaLore", bfloat16_galore, lambda sizes: adamw8bit(RATE)),
    MemoryRow("8-bit GaLore, written at each step", written, lambda sizes: adamw8bit(RATE)),
    MemoryRow(
        "8-bit GaLore, bases all together",
        lambda sizes: bfloat16_galore(sizes, together=None),
        lambda sizes: adamw8bit(RATE),
    ),
    MemoryRow("8-bit GaLore, bases by iteration", iterated, lambda sizes: adamw8bit(RATE)),
    MemoryRow("GaLore with 8-bit Lion", bfloat16_galore, lambda sizes: lion8bit(RATE)),
    MemoryRow("Natural GaLore", bfloat16_natural),
    MemoryRow("optax.contrib.galore, as it is", full, optax_as_it_is),
    MemoryRow("optax.contrib.galore, per matrix", full, lambda sizes: optax_galore(sizes)(RATE)),
    MemoryRow("LoRA", lora),
    MemoryRow("LoRA, factors in bfloat16", bfloat16_lora),
    MemoryRow("low-rank restarts", restarts),
    MemoryRow("SwitchLoRA", switchlora, lambda sizes: row_adamw(RATE)),
)
