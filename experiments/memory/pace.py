r"""The time of a step of every method on SST-2 with MiniLM, one step of each in turn.

    python -m experiments.memory.pace --sst2.train train.tsv --sst2.evaluation dev.tsv \
        --sst2.output experiments/memory/results/sst2 --sst2.max-length 32 --rounds 5

gives the recorded table; pace.json has every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.memory.entrants import entrants
from experiments.memory.sst2 import RANK, SIZE
from experiments.sst2.run import Options as Sst2Options
from experiments.sst2.run import make_method, open_minilm, read_texts
from experiments.tuning.pace import Step, measure_pace, pace_table
from experiments.tuning.report import write_json
from peftjax.losses import Batch, classification
from peftjax.train.config import TrainConfig
from peftjax.train.data.batches import training_batches
from peftjax.train.optimizer import make_optimizer
from peftjax.train.step import make_step
from peftjax.transform.transform import Transform


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure on."""

    sst2: Sst2Options
    """The task; pace.json and pace.md go to its output folder."""
    rounds: int = 10
    """Steps of each method."""


def make_stepper(model: Any, params: Any, method: Transform, batches: Iterator[Batch]) -> Step:
    """One step after the other of a run."""
    tx = method.optimizer(make_optimizer(TrainConfig(learning_rate=1e-3), 1000))
    step = make_step(method.model(model), method, tx, classification)
    frozen, trainable = method.init(jax.random.key(0), params)
    state = jax.tree.map(jnp.copy, (trainable, tx.init(trainable)))

    def advance() -> Any:
        nonlocal state
        trainable, opt_state, _ = step(*state, frozen, next(batches), jax.random.key(0))
        state = (trainable, opt_state)
        return trainable

    return advance


def main(options: Options) -> None:
    """Measure, write and print."""
    texts = read_texts(options.sst2)
    model, params = open_minilm(0)
    steps = {}
    for entrant in entrants(RANK, SIZE):
        method = make_method(entrant, model, params, texts, options.sst2, 0)
        batches = training_batches(texts.train, options.sst2.batch, 0)
        steps[entrant.label] = make_stepper(model, params, method, batches)
    seconds = measure_pace(steps, options.rounds)
    found = pace_table(seconds, f"LoRA r={RANK}")
    options.sst2.output.mkdir(parents=True, exist_ok=True)
    write_json(options.sst2.output / "pace.json", seconds)
    (options.sst2.output / "pace.md").write_text(found)
    print(found)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
