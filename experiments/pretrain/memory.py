"""What pre-training a Llama needs with each optimizer, asked of the H200's compiler; nothing is run.

    JAX_PLATFORMS=cpu python -m experiments.pretrain.memory

See `experiments.memory.run` for what must be installed. The Llamas of 60 million to 7 billion parameters of
GaLore's paper, one row of 256 tokens, parameters and optimizer state in bfloat16, each block made again in
the backward pass, the loss over 512 tokens at a time. What a method does between steps, such as a new
projection, is one or more programs of its own, of which the table has the largest. Results of an earlier run
stay where this one does not replace them.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.memory.rows import Row
from experiments.memory.run import measure
from experiments.memory.table import fill_table
from experiments.pretrain.entrants import Projection
from experiments.pretrain.memory_report import plot, report
from experiments.pretrain.memory_rows import ROWS, MemoryRow
from experiments.pretrain.sizes import SIZES, Size
from experiments.pretrain.versions import versions
from peftjax.planner.residuals import nbytes

REMAT = "nothing_saveable"
EVERY, SCALE, STEPS = 200, 0.25, 10_000


@dataclasses.dataclass(frozen=True)
class Options:
    """What to ask the compiler, and where to write."""

    output: Path = Path("experiments/pretrain/results/memory")
    """Where memory.json, memory.md and memory.png go."""
    target: str = "h200"
    """The machine."""
    sizes: tuple[str, ...] = tuple(size.name for size in SIZES)
    """Which models."""
    rows: tuple[str, ...] = tuple(row.name for row in ROWS)
    """Which methods."""


def measure_row(size: Size, row: MemoryRow, target: str) -> dict[str, Any]:
    """The plan of a step and of what is done between steps, and what lies beside the weights."""
    projection = Projection(size.rank, EVERY, SCALE, STEPS)
    subject, optimizer = size.subject, row.optimizer(projection)
    method = row.method(projection)
    found = measure(subject, Row(row.name, lambda: method, REMAT), target, optimizer=optimizer)
    if "peak" not in found:
        return found
    model = dataclasses.replace(subject.model(), remat=REMAT)
    weights = nbytes(jax.tree.leaves(subject.params(model)))
    sizes = found["bytes"]
    resident = sum(sizes[kind] for kind in ("weights", "method_state", "trainable", "optimizer"))
    return {**found, "model": weights, "beside": resident - weights, **versions()}


def main(options: Options) -> None:
    """Measure, and write what was measured after every row."""
    rows = [
        (size.name, row.name, partial(measure_row, size, row, options.target))
        for size in SIZES
        for row in ROWS
        if size.name in options.sizes and row.name in options.rows
    ]
    fill_table(options.output, rows, report, plot)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
