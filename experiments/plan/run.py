r"""What does a training step need on a machine that is not there, and how fast can it be at most?

    pip install -e ".[experiments,plan]"
    pip install --no-deps jax-cuda13-pjrt==JAX jax-cuda13-plugin==JAX    # JAX: the version of jax
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
    JAX_PLATFORMS=cpu python -m experiments.plan.run --missing

Expected:

    | results | of | is |
    |---|---|---|
    | topologies | Weak scaling | flat, at most 1.000 times the least bytes a chip, 16 to 256 chips |
    | topologies | Llama-3-8B on one H100 | at most 27,421 tokens/s (published 12,473) |
    | topologies | Llama-3-8B on one H200, LoRA | 17.58 GiB, fits, at most 20,805 tokens/s a device |
    | topologies | Llama-3-8B on one H200, QLoRA | 7.74 GiB, fits, at most 20,805 tokens/s a device |
    | topologies | Llama-3-8B on 8 H200, LoRA | 4.73 GiB, fits, at most 20,805 tokens/s a device |
    | topologies | Llama-3-8B on 8 H200, QLoRA | 3.30 GiB, fits, at most 20,805 tokens/s a device |
    | topologies | Llama-3-8B on v5e-16, LoRA | 3.42 GiB, fits, at most 4,143 tokens/s a device |
    | topologies | Llama-3-8B on v5e-16, QLoRA | 2.77 GiB, fits, at most 4,143 tokens/s a device |
    | topologies | Llama-3-8B on v5e-256, LoRA | 2.36 GiB, fits, at most 4,143 tokens/s a device |
    | topologies | Llama-3-70B on one H200, LoRA | 142.21 GiB, does not fit, at most 2,390 tokens/s a device |
    | topologies | Llama-3-70B on one H200, QLoRA | 46.53 GiB, fits, at most 2,390 tokens/s a device |

Asked of the compilers of TPUs and GPUs; nothing is run, and none of them has to be there. Llama-3-8B and 70B
with all their layers, from their configurations alone, on rows of 4,096 tokens, one for each device. The
tokens a second are bounds from the program and the vendors' numbers (`peftjax/planner/machines.toml`), no
measurements. A cell that does not fit, or does not compile, is a result too. Every cell is written when it
is known; `--missing` goes on where a run was stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from experiments.harness.memory import fill
from experiments.plan import topologies

REPORTS = {"topologies": topologies.REPORT}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to ask the compilers, and where to write."""

    models: tuple[str, ...] = ()
    """Models on machines, such as "Llama-3-8B on v5e-16"; all where none is given."""
    contenders: tuple[str, ...] = ()
    """Labels of the methods to measure; all where none is given."""
    missing: bool = False
    """Measure only what has no result yet."""
    output: Path | None = None
    """Where the results go; by default a folder beside this file."""


def main(options: Options) -> None:
    """Measure, and write what was measured after every cell."""
    print(
        fill(
            topologies.make_table(),
            options.output or Path(__file__).parent / "results" / "topologies",
            "cpu",
            models=options.models,
            contenders=options.contenders,
            missing=options.missing,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
