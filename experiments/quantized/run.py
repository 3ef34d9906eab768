r"""What does a base of 4 bits save in a training step?

    pip install -e ".[experiments]"
    pip install --no-deps jax-cuda13-pjrt==JAX jax-cuda13-plugin==JAX    # JAX: the version of jax
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
    JAX_PLATFORMS=cpu python -m experiments.quantized.run
    JAX_PLATFORMS=cpu python -m experiments.quantized.run --table long_rows

Expected, the peak of a step:

    | results | of | is |
    |---|---|---|
    | memory | 7B, 1 x 512, LoRA, bfloat16 | 16.51 GiB |
    | memory | 7B, 1 x 512, QLoRA | 7.53 GiB |
    | memory | 7B, 1 x 512, QLoRA + remat | 6.38 GiB |
    | memory | 65B, 1 x 512, LoRA, bfloat16 | 141.08 GiB |
    | memory | 65B, 1 x 512, QLoRA | 51.38 GiB |
    | memory | 65B, 1 x 512, QLoRA + remat | 45.38 GiB |
    | memory | 65B, 16 x 512, QLoRA + remat | 58.35 GiB |
    | memory | 7B, 16 x 512, QLoRA + remat | 10.15 GiB |
    | long_rows | Llama-3-8B, QLoRA, offloaded, tiles | 6.60 GiB + 98.6 kB a token (record 7.37 + 227.5) |
    | long_rows | Llama-3-70B, QLoRA, offloaded, tiles | 43.56 GiB + 145.7 kB a token (record 42.99 + 444.6) |

Asked of the H200's compiler; nothing is run, and no GPU is needed. The first LLaMAs, with random weights'
shapes alone, in bfloat16 on rows of 512 tokens; LoRA of rank 64 on every linear layer but the head, as in
QLoRA's paper, with AdamW in float32. Long rows: Llama-3, LoRA of rank 32, one row; the record is the line
through the longest rows known to us for QLoRA at these sizes. Results of an earlier run stay where this
one does not replace them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from experiments.harness.memory import fill
from experiments.quantized import long_rows, memory

TABLES = {"memory": memory.make_table, "long_rows": long_rows.make_table}
REPORTS = {"memory": memory.REPORT, "long_rows": long_rows.REPORT}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to ask the compiler, and where to write."""

    table: Literal["memory", "long_rows"] = "memory"
    """What is asked: LLaMAs on rows of 512 tokens, or Llama-3 on one long row."""
    models: tuple[str, ...] = ()
    """Names of the models to measure; all where none is given."""
    contenders: tuple[str, ...] = ()
    """Labels of the contenders to measure; all where none is given."""
    missing: bool = False
    """Measure only what has no result yet."""
    target: str = "h200"
    """The machine."""
    output: Path | None = None
    """Where the results go; by default the folder of the table beside this file."""


def main(options: Options) -> None:
    """Measure, and write what was measured after every contender."""
    print(
        fill(
            TABLES[options.table](),
            options.output or Path(__file__).parent / "results" / options.table,
            options.target,
            models=options.models,
            contenders=options.contenders,
            missing=options.missing,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
