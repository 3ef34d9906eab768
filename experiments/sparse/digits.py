"""The sparse methods on the transfer from the digits 0-4 to the digits 5-9.

    pip install -e ".[experiments]"
    python -m experiments.sparse.digits --output experiments/sparse/results/digits

What is done is said in `experiments.digits.run`.
"""

import tyro

from experiments.digits.run import Options, main
from experiments.sparse.entrants import entrants

RANK = 4
DENSITY = 7 / 128
"""LoRA of that rank has 7,168 numbers a block, whose linear weights have 131,072."""

if __name__ == "__main__":
    main(entrants(RANK, DENSITY), tyro.cli(Options, description=__doc__))
