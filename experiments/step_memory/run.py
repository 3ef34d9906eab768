r"""What must be in memory for a training step of each method?

    pip install -e ".[experiments]"
    pip install --no-deps jax-cuda13-pjrt==JAX jax-cuda13-plugin==JAX    # JAX: the version of jax
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
    JAX_PLATFORMS=cpu python -m experiments.step_memory.run --table blocks
    JAX_PLATFORMS=cpu python -m experiments.step_memory.run --table depth
    JAX_PLATFORMS=cpu python -m experiments.step_memory.run --table sparse
    JAX_PLATFORMS=cpu python -m experiments.step_memory.run --table pretraining

Expected, the peak of a step:

    | results | of | is |
    |---|---|---|
    | blocks | full | 24.66 GiB on RoBERTa-large |
    | blocks | LoRA | 20.94 GiB on RoBERTa-large |
    | blocks | LoRA + remat | 4.63 GiB on RoBERTa-large |
    | blocks | LoRA + 4-bit residuals | 7.30 GiB on RoBERTa-large |
    | blocks | S2A | 5.23 GiB on RoBERTa-large |
    | blocks | LST 1/8 | 5.75 GiB on RoBERTa-large |
    | blocks | MEFT1 | 3.65 GiB on RoBERTa-large |
    | depth | full | x 6.3 from 6 to 48 layers |
    | depth | LoRA | x 6.8 from 6 to 48 layers |
    | depth | LoRA + remat | x 2.3 from 6 to 48 layers |
    | depth | MEFT1, no anchors | x 1.0 from 6 to 48 layers |
    | sparse | full | 1.94 GiB on ViT-B/16 |
    | sparse | LoRA-8 | 1.05 GiB on ViT-B/16 |
    | sparse | SNELL-8 | 1.00 GiB on ViT-B/16 |
    | sparse | SNELLA-32 | 1.11 GiB on ViT-B/16 |
    | sparse | masked | 2.01 GiB on ViT-B/16 |
    | sparse | PaCA-16 | 0.99 GiB on ViT-B/16 |
    | sparse | SHiRA-8 | 1.01 GiB on ViT-B/16 |
    | pretraining | AdamW | 50.23 GiB on 7B |
    | pretraining | 8-bit AdamW | 37.92 GiB on 7B |
    | pretraining | GaLore | 27.98 GiB on 7B |
    | pretraining | 8-bit GaLore | 24.60 GiB on 7B |
    | pretraining | 8-bit GaLore, written at each step | 21.58 GiB on 7B |
    | pretraining | GaLore with 8-bit Lion | 22.81 GiB on 7B |
    | pretraining | LoRA | 52.31 GiB on 7B |

Asked of the H200's compiler; nothing is run, and no GPU is needed. RoBERTa-large (32 x 512 tokens) and
ViT-L/16 (32 images of 224 x 224) in float32, Llama-3-8B (8 x 2,048 tokens) in bfloat16, parameters and
optimizer state too; ViT-B/16, L/16 and H/14 on 8 images; the Llamas of GaLore's paper on 256 tokens. AdamW,
no dropout. A classifier's last layer is trained beside every method. Results of an earlier run stay where
this one does not replace them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from experiments.harness.memory import fill
from experiments.step_memory import blocks, depth, pretraining, sparse

TABLES = {"blocks": blocks, "depth": depth, "sparse": sparse, "pretraining": pretraining}
REPORTS = {name: module.REPORT for name, module in TABLES.items()}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to ask the compiler, and where to write."""

    table: Literal["blocks", "depth", "sparse", "pretraining"]
    """Which models and contenders."""
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
    text = fill(
        TABLES[options.table].make_table(),
        options.output or Path(__file__).parent / "results" / options.table,
        options.target,
        models=options.models,
        contenders=options.contenders,
        missing=options.missing,
    )
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
