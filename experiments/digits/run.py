"""Methods side by side on the transfer from the digits 0-4 to the digits 5-9.

    pip install -e ".[experiments]"
    python -m experiments.digits.run --output digits

compares LoRA with full fine-tuning, BitFit and training the head alone; a comparison of other methods
names them and calls `main`, such as `experiments.sparse.digits`.

A ViT of the library (2 blocks, width 128, 17 tokens) is trained from scratch on real images of the digits
0-4, once. Every method then adapts it to 5-9 with a few images of each class. A seed decides on which
images are trained and validated on, how the new classifier and the adapter start, and the order of the
batches; the pre-trained model and the test images are the same for all. Every method has the same steps,
batches and optimizer; its learning rate is the one of a grid, the same for all, with the best validation
accuracy over all seeds. The same command again leaves out the methods that runs.json has.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

import peftjax as pj
from experiments.digits.data import Images, load_images
from experiments.digits.pretrain import Pretraining, pretrain
from experiments.digits.transfer import Transfer, make_method, make_tasks, transfer
from experiments.tuning.entrants import Entrant, adapter_size, references, require_equal
from experiments.tuning.progress import progress_bar
from experiments.tuning.record import Run, open_record
from experiments.tuning.report import write_report
from peftjax.core import tree

TOLERANCE = 0.05
"""How far apart the numbers of trained parameters may be."""
ENTRANTS = (*references(), Entrant("LoRA", lambda setting: pj.lora(rank=4)))


@dataclasses.dataclass(frozen=True)
class Options:
    """The model, the task and where the results go."""

    output: Path
    """Where runs.json, results.json, results.md and results.png go."""
    pretraining: Pretraining = dataclasses.field(default_factory=Pretraining)
    transfer: Transfer = dataclasses.field(default_factory=Transfer)


def main(entrants: Sequence[Entrant], options: Options) -> None:
    """Compare, write the results and print the table.

    Raises:
        PeftError: scikit-learn is missing, matched methods train different numbers of parameters, or the
            output folder has results of other settings.
    """
    results = compare(load_images(), entrants, options, Console(stderr=True))
    print(write_report(options.output, describe(results), results))


def compare(
    images: Images, entrants: Sequence[Entrant], options: Options, console: Console
) -> dict[str, Any]:
    """Pre-train, and transfer with every method that has no line in runs.json yet.

    Raises:
        PeftError: matched methods train numbers of parameters that differ by more than `TOLERANCE`, or
            runs.json has other settings.
    """
    settings = {name: dataclasses.asdict(getattr(options, name)) for name in ("pretraining", "transfer")}
    record = open_record(options.output / "runs.json", settings)
    base = pretrain(images, options.pretraining)
    console.print(f"pre-trained: accuracy {base.accuracy:.3f} on held-out images of the digits 0-4")
    tasks, test = make_tasks(images, base, options.transfer)
    methods = [make_method(entrant, base, tasks[0], options.transfer) for entrant in entrants]
    require_equal([(e, adapter_size(m, tasks[0].params)) for e, m in zip(entrants, methods)], TOLERANCE)
    lines = []
    runs_of_each = len(options.transfer.rates) * options.transfer.seeds
    with progress_bar(len(entrants) * runs_of_each, console) as advance:
        for entrant in entrants:

            def run(entrant: Entrant = entrant) -> Run:
                return transfer(entrant, base, tasks, test, options.transfer, advance)

            lines.append(record.recall({"label": entrant.label}, run))
            jax.clear_caches()  # a process can map only so many programs into memory
            scores = ", ".join(f"{score:.3f}" for score in lines[-1]["accuracy"])
            console.print(f"{entrant.label}: {scores} at learning rate {lines[-1]['rate']:g}")
    return {
        **settings,
        "pretrained_accuracy": base.accuracy,
        "parameters": tree.count(base.params),
        "head_parameters": tree.count(base.params["head"]["classifier"]),
        "test_images": len(test),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "scikit-learn")},
        "lines": lines,
    }


def describe(results: dict[str, Any]) -> str:
    """What was compared, for above the table."""
    model, task = results["pretraining"], results["transfer"]
    sentences = (
        f"ViT (width {model['width']}, {model['layers']} blocks, {results['parameters']:,} parameters) "
        f"pre-trained on the digits 0-4 (accuracy {results['pretrained_accuracy']:.3f}), adapted to 5-9 with "
        f"{task['shots']} images of each class: {task['steps']} steps of {task['batch']} images, "
        f"{task['seeds']} seeds, {results['test_images']} test images.",
        f"Learning rate out of {', '.join(f'{rate:g}' for rate in task['rates'])} by {task['validation']} "
        "validation images of each class.",
        "Accuracy in %, mean and standard deviation; differences seed by seed, mean and standard error.",
        f"All train the classifier too ({results['head_parameters']:,} parameters, not counted).",
        f"{results['machine']}; {', '.join(f'{name} {n}' for name, n in results['versions'].items())}; "
        f"{sum(line['seconds'] for line in results['lines']):.0f} s in all.",
    )
    return " ".join(sentences)


if __name__ == "__main__":
    main(ENTRANTS, tyro.cli(Options, description=__doc__))
