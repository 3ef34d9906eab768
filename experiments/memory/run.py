"""What a training step of each method needs, asked of the H200's compiler; nothing is run.

    pip install -e ".[experiments]"
    pip install --no-deps jax-cuda13-pjrt==JAX jax-cuda13-plugin==JAX    # JAX: the version of jax
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
    JAX_PLATFORMS=cpu python -m experiments.memory.run

RoBERTa-large (32 x 512 tokens) and ViT-L/16 (32 images of 224 x 224) in float32, Llama-3-8B (8 x 2,048
tokens) in bfloat16, parameters and optimizer state too; AdamW, no dropout. A classifier's last layer is
trained beside every method. Results of an earlier run stay where this one does not replace them.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

import peftjax as pj
from experiments.memory.report import plot, report
from experiments.memory.rows import ROWS, Row
from experiments.memory.subjects import SUBJECTS, Subject
from experiments.memory.table import fill_table
from peftjax.core.errors import PeftError


@dataclasses.dataclass(frozen=True)
class Options:
    """What to ask the compiler, and where to write."""

    output: Path = Path("experiments/memory/results")
    """Where memory.json, memory.md and memory.png go."""
    target: str = "h200"
    """The machine."""
    subjects: tuple[str, ...] = tuple(subject.name for subject in SUBJECTS)
    """Which models."""
    rows: tuple[str, ...] = tuple(row.name for row in ROWS)
    """Which methods."""


def measure(
    subject: Subject,
    row: Row,
    target: str,
    layers: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> dict[str, Any]:
    """What one step needs, as JSON values; of a method that a model does not have, the reason.

    The optimizer is AdamW where none is given.
    """
    model = row.model(subject.model(layers))
    params = subject.params(model)
    optimizer = optimizer or optax.adamw(1e-3, weight_decay=0.0)
    try:
        plan = pj.plan(
            row.method(model, params),
            model,
            params,
            subject.inputs(model),
            optimizer=optimizer,
            target=target,
        )
    except PeftError as error:
        return {"reason": str(error)}
    return {**dataclasses.asdict(plan), "peak": plan.bytes.peak, "jax": jax.__version__}


def main(options: Options) -> None:
    """Measure, and write what was measured after every row."""
    rows = [
        (subject.name, row.name, partial(measure, subject, row, options.target))
        for subject in SUBJECTS
        for row in ROWS
        if subject.name in options.subjects and row.name in options.rows
    ]
    fill_table(options.output, rows, report, plot)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
