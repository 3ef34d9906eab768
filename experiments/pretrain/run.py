r"""A small Llama trained from scratch on the bytes of a text with every optimizer.

    pip install -e ".[experiments]"
    python -m experiments.pretrain.run --data wikitext2 --output experiments/pretrain/results/wikitext2

`--data` is a folder of .txt files; the last tenth of their bytes is held out, half of it to choose learning
rates by and half to test on. The recorded runs are on the validation and test files of WikiText-2 (there was
no training file), and on Tiny Shakespeare.

All methods train from the same parameters (those of the seed) on the same batches (those of the seed) for
the same number of steps: Adam without weight decay, gradients (as the optimizer is given them: projected
ones, or those of factors) clipped to norm 1, a learning rate that rises over a tenth of the steps and falls
along a cosine to a tenth of its peak. The peak of a method is the best one on the held-out part with seed
0: of three, and of more where the best of them is the first or last, a factor apart. The other seeds run at
that one. The same command again goes on with a comparison that was stopped: every finished run is in
runs.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.pretrain.data import Text, first_batches, read_text, small_llama, training_batches
from experiments.pretrain.entrants import ENTRANTS, Entrant, Projection
from experiments.pretrain.loop import Programs, compile_programs, score, train
from experiments.pretrain.report import write_report
from experiments.pretrain.versions import versions
from experiments.tuning.progress import progress_bar
from experiments.tuning.record import Record, Run, open_record
from peftjax.backbone.backbone import Params
from peftjax.planner.residuals import nbytes

WIDER = 2
"""How often the learning rates are extended, at most."""
EVALUATED = 16
"""Rows of a batch that is only evaluated."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained on what."""

    data: Path
    """A folder of .txt files."""
    output: Path
    """Where runs.json, results.md, results.json and results.png go."""
    width: int = 160
    """Of the model, a multiple of 32; a head has 32."""
    layers: int = 4
    """Blocks."""
    length: int = 128
    """Bytes of a row."""
    batch: int = 8
    """Rows a step."""
    steps: int = 240
    """Optimizer steps."""
    rank: int = 40
    """Of factors and projections: a quarter of the width, as in GaLore's runs."""
    every: int = 40
    """Steps between projections or restarts."""
    scale: float = 0.25
    """Of a projected step."""
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Peak learning rates."""
    seeds: int = 3
    """Runs of each method at its best rate."""
    watch: int = 20
    """Steps between evaluations for the curves."""
    watched: int = 4
    """Batches of 16 rows for the curves, of the held-out part; at the end it is `tested`."""
    tested: int = 16
    """Batches of 16 rows of the held-out part and of the test part, after the last step."""
    only: tuple[str, ...] = ()
    """Labels of the methods to run; all where none is given. The report has all that is recorded."""

    @property
    def sizes(self) -> Projection:
        """What the methods need to know."""
        return Projection(self.rank, self.every, self.scale, self.steps)


def make_runner(entrant: Entrant, text: Text, options: Options) -> Callable[[float, int], Run]:
    """`(rate, seed) -> run`; the method's programs are compiled with the first."""
    model = small_llama(options.width, options.layers, options.length)
    init = jax.jit(model.init)
    curve = first_batches(text.held_out, options.length, EVALUATED, options.watched)
    held_out, test = (
        first_batches(part, options.length, EVALUATED, options.tested) for part in (text.held_out, text.test)
    )
    programs: Programs | None = None
    measured_with = versions()

    def run(rate: float, seed: int) -> Run:
        nonlocal programs
        if programs is None:
            method, optimizer = entrant.method(options.sizes), entrant.optimizer(options.sizes)
            programs = compile_programs(model, method, optimizer, options.steps)
        params = init(jax.random.key(seed))
        trained = train(
            programs,
            params,
            training_batches(text.train, options.length, options.batch, seed),
            curve,
            rate=rate,
            seed=seed,
            steps=options.steps,
            every=options.watch,
        )
        return {
            "beside_weights": beside_weights(programs, params),
            "held_out": score(programs, trained, held_out),
            "test": score(programs, trained, test),
            "curve": [(step, loss if math.isfinite(loss) else None) for step, loss in trained.curve],
            "seconds": trained.seconds,
            **measured_with,
        }

    return run


def beside_weights(programs: Programs, params: Params) -> int:
    """The bytes that a step is given beside the model's own parameters and the batch."""
    frozen, trainable = jax.eval_shape(programs.method.init, jax.random.key(0), params)
    state = jax.eval_shape(programs.tx.init, trainable)
    return nbytes(jax.tree.leaves((frozen, trainable, state))) - nbytes(jax.tree.leaves(params))


def held_out_loss(run: Run) -> float:
    """To compare runs by: infinite where one diverged."""
    return math.inf if run["held_out"] is None else run["held_out"]


def best_rate(run: Callable[[float, int], Run], rates: Sequence[float]) -> float:
    """The rate that is best with seed 0, looked for beyond the first and the last where one of them is."""
    tried = list(rates)
    factor = tried[1] / tried[0]
    losses = [held_out_loss(run(rate, 0)) for rate in tried]
    for _ in range(WIDER):
        best = losses.index(min(losses))
        if 0 < best < len(tried) - 1:
            break
        place, rate = (0, tried[0] / factor) if best == 0 else (len(tried), tried[-1] * factor)
        rate = float(f"{rate:.1e}")
        tried.insert(place, rate)
        losses.insert(place, held_out_loss(run(rate, 0)))
    return tried[losses.index(min(losses))]


def compare(entrants: Sequence[Entrant], text: Text, record: Record, options: Options) -> None:
    """Run what is missing."""
    with progress_bar((len(options.rates) + options.seeds) * len(entrants)) as advance:
        for entrant in entrants:
            fit = make_runner(entrant, text, options)

            def run(rate: float, seed: int, label: str = entrant.label, fit: Any = fit) -> Run:
                identity = {"label": label, "rate": rate, "seed": seed}
                found = record.recall(identity, lambda: fit(rate, seed))
                advance(f"{label}, learning rate {rate:g}, seed {seed}: {held_out_loss(found):.4f}")
                return found

            rate = best_rate(run, options.rates)
            for seed in range(options.seeds):
                run(rate, seed)


def main(options: Options, entrants: Sequence[Entrant] = ENTRANTS) -> None:
    """Run what is missing, and write what is recorded.

    Raises:
        PeftError: the recorded runs have other settings, or there is no text.
    """
    text = read_text(options.data)
    settings = dataclasses.asdict(options) | {"data": options.data.name}
    del settings["output"], settings["only"]
    record = open_record(options.output / "runs.json", settings)
    chosen = [entrant for entrant in entrants if not options.only or entrant.label in options.only]
    compare(chosen, text, record, options)
    print(write_report(options.output, record, [entrant.label for entrant in entrants]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
