"""Methods of blocks on the transfer from the digits 0-4 to the digits 5-9.

    pip install -e ".[experiments]"
    python -m experiments.memory.digits --output experiments/memory/results/digits --transfer.seeds 3

What is done is said in `experiments.digits.run`. The recorded runs had other work beside them, so the times
of their steps were taken out of the record.
"""

import tyro

from experiments.digits.run import Options, main
from experiments.memory.entrants import entrants

RANK, SIZE = 4, 28

if __name__ == "__main__":
    main(entrants(RANK, SIZE), tyro.cli(Options, description=__doc__))
