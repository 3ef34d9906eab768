r"""Which optimizer pre-trains a small Llama on the bytes of a text best?

    pip install -e ".[experiments]"
    python -m experiments.pretrain_bytes.run --data wikitext2
    python -m experiments.pretrain_bytes.run --data tinyshakespeare

Expected, the loss of the test part:

    | results | of | is |
    |---|---|---|
    | wikitext2 | SwitchLoRA | 1.8604 ± 0.0067 nats per byte |
    | wikitext2 | 8-bit GaLore | 1.8628 ± 0.0097 nats per byte |
    | wikitext2 | GaLore | 1.8633 ± 0.0119 nats per byte |
    | wikitext2 | GaLore, moments rotated | 1.8663 ± 0.0063 nats per byte |
    | wikitext2 | AdamW | 2.0154 ± 0.0154 nats per byte |
    | tinyshakespeare | SwitchLoRA | 2.0054 ± 0.0102 nats per byte |
    | tinyshakespeare | 8-bit GaLore | 2.0145 ± 0.0205 nats per byte |
    | tinyshakespeare | GaLore | 2.0188 ± 0.0170 nats per byte |
    | tinyshakespeare | GaLore, moments rotated | 2.0209 ± 0.0249 nats per byte |
    | tinyshakespeare | AdamW | 2.1794 ± 0.0488 nats per byte |

`--data` is a folder of .txt files; the last tenth of their bytes is held out, half of it to choose learning
rates by and half to test on. The recorded runs are on the validation and test files of WikiText-2 (there was
no training file), and on Tiny Shakespeare.

All contenders train from the same parameters (those of the seed) on the same batches (those of the seed) for
the same number of steps: Adam without weight decay, gradients (as the optimizer is given them: projected
ones, or those of factors) clipped to norm 1, a learning rate that rises over a tenth of the steps and falls
along a cosine to a tenth of its peak. The peak of a contender is the best one on the held-out part with seed
0: of three, and of more where the best of them is the first or last, a factor apart. The other seeds run at
that one. The same command continues a comparison that was stopped: every finished run is in the
output folder's runs.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

from experiments.harness.contenders import Contender, Setting
from experiments.harness.pretraining import CONTENDERS, Schedule, optimizer_of
from experiments.harness.progress import progress_bar
from experiments.harness.record import Record, Run, commit, open_record, provenance
from experiments.harness.report import write_report
from experiments.harness.training import Programs, make_programs, train
from experiments.pretrain_bytes.data import Text, first_batches, read_text, small_llama, training_batches
from experiments.pretrain_bytes.report import REPORT, summarize
from peftjax.planner.residuals import nbytes
from peftjax.train.step import TrainingState


@dataclasses.dataclass(frozen=True)
class Options:
    """The contenders, their data and the length of a run."""

    data: Path
    """A folder of .txt files."""
    output: Path | None = None
    """Where the results go; by default a folder named like the data beside this file."""
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
    wider: int = 2
    """How often the learning rates are extended, at most."""
    seeds: int = 3
    """Runs of each contender at its best rate."""
    watch: int = 20
    """Steps between evaluations for the curves."""
    evaluated: int = 16
    """Rows of a batch that is only evaluated."""
    watched: int = 4
    """Such batches for the curves, of the held-out part; at the end it is `tested`."""
    tested: int = 16
    """Such batches of the held-out part and of the test part, after the last step."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    only: tuple[str, ...] = ()
    """Labels of the contenders to run; all where none is given. The report has all that is recorded."""

    @property
    def setting(self) -> Setting:
        """What the contenders need to know."""
        return Setting(self.steps, self.rank, self.every, self.scale)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.output or Path(__file__).parent / "results" / self.data.name


def make_runner(contender: Contender, text: Text, options: Options) -> Callable[[float, int], Run]:
    """`(rate, seed) -> run`; the contender's programs are compiled with the first."""
    model = small_llama(options.width, options.layers, options.length)
    init = jax.jit(model.init)
    rows = options.evaluated
    watched = first_batches(text.held_out, options.length, rows, options.watched)
    held_out, test = (
        first_batches(part, options.length, rows, options.tested) for part in (text.held_out, text.test)
    )
    method = contender.method(options.setting)
    programs: Programs | None = None

    def run(rate: float, seed: int) -> Run:
        nonlocal programs
        if programs is None:
            optimizer = optimizer_of(contender, options.setting, options.schedule)
            programs = make_programs(model, method, optimizer)
        params = init(jax.random.key(seed))
        start = programs.start(method, params, rate, seed)
        beside = nbytes(jax.tree.leaves((start.frozen, start.trainable, start.opt_state)))
        curve: list[tuple[int, float]] = []

        def visit(state: TrainingState) -> None:
            curve.append((state.step, programs.evaluate(state, watched)["loss"]))

        trained = train(
            programs,
            start,
            training_batches(text.train, options.length, options.batch, seed),
            options.steps,
            every=options.watch,
            visit=visit,
        )
        diverged = trained.diverged or not math.isfinite(curve[-1][1])
        scores = [
            None if diverged else programs.evaluate(trained.state, part)["loss"] for part in (held_out, test)
        ]
        return {
            "beside_weights": beside - nbytes(jax.tree.leaves(params)),
            "held_out": scores[0],
            "test": scores[1],
            "curve": [(step, loss if math.isfinite(loss) else None) for step, loss in curve],
            "seconds": trained.seconds,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "commit": commit(),
        }

    return run


def held_out_loss(run: Run) -> float:
    """To compare runs by: infinite where one diverged."""
    return math.inf if run["held_out"] is None else run["held_out"]


def best_rate(run: Callable[[float, int], Run], rates: Sequence[float], wider: int) -> float:
    """The rate that is best with seed 0, looked for beyond the first and the last where one of them is."""
    tried = list(rates)
    factor = tried[1] / tried[0]
    losses = [held_out_loss(run(rate, 0)) for rate in tried]
    for _ in range(wider):
        best = losses.index(min(losses))
        if 0 < best < len(tried) - 1:
            break
        place, rate = (0, tried[0] / factor) if best == 0 else (len(tried), tried[-1] * factor)
        rate = float(f"{rate:.1e}")
        tried.insert(place, rate)
        losses.insert(place, held_out_loss(run(rate, 0)))
    return tried[losses.index(min(losses))]


def compare(contenders: Sequence[Contender], text: Text, record: Record, options: Options) -> None:
    """Run what is missing."""
    with progress_bar((len(options.rates) + options.seeds) * len(contenders)) as advance:
        for contender in contenders:
            fit = make_runner(contender, text, options)

            def run(rate: float, seed: int, label: str = contender.label, fit: Any = fit) -> Run:
                identity = {"label": label, "rate": rate, "seed": seed}
                found = record.recall(identity, lambda: fit(rate, seed))
                advance(f"{label}, learning rate {rate:g}, seed {seed}: {held_out_loss(found):.4f}")
                return found

            rate = best_rate(run, options.rates, options.wider)
            for seed in range(options.seeds):
                run(rate, seed)


def main(options: Options, contenders: Sequence[Contender] = CONTENDERS) -> None:
    """Run what is missing, and write what is recorded.

    Raises:
        PeftError: the recorded runs have other settings, or there is no text.
    """
    text = read_text(options.data)
    settings = dataclasses.asdict(options) | {"data": options.data.name}
    for name in ("output", "only", "wider"):
        del settings[name]
    record = open_record(options.folder, settings)
    chosen = [contender for contender in contenders if not options.only or contender.label in options.only]
    compare(chosen, text, record, options)
    found = summarize(settings, record.runs, [contender.label for contender in contenders])
    print(write_report(options.folder, REPORT, {**provenance("jax", "optax"), **found}))


REPORTS = {"wikitext2": REPORT, "tinyshakespeare": REPORT}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
