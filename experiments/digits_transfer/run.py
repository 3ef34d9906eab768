r"""With ten images of each new class, which methods adapt a small ViT best?

    pip install -e ".[experiments]"
    python -m experiments.digits_transfer.run --contenders blocks --transfer.seeds 3
    python -m experiments.digits_transfer.run --contenders sparse

Expected, the accuracy on the test images:

    | results | of | is |
    |---|---|---|
    | blocks | full | 81.4 ± 5.3 % |
    | blocks | MEFT2 14 | 81.1 ± 7.9 % |
    | blocks | LoRA r=4 | 79.7 ± 5.0 % |
    | blocks | LoRA r=4, 4-bit residuals | 77.1 ± 3.9 % |
    | blocks | S2A | 75.0 ± 1.7 % |
    | sparse | full | 80.3 ± 4.3 % |
    | sparse | DoRA r=4, 3 | 79.2 ± 4.8 % |
    | sparse | SHiRA gradient | 79.1 ± 3.6 % |
    | sparse | SHiRA snip | 78.4 ± 5.5 % |
    | sparse | SNELLA r=4 | 78.2 ± 3.5 % |
    | sparse | LoRA r=4 | 75.8 ± 4.2 % |

A ViT of the library (2 blocks, width 128, 17 tokens) is trained from scratch on real images of the digits
0-4, once. Every contender then adapts it to 5-9. A seed decides on which images are trained and validated on,
how the new classifier and the adapter start, and the order of the batches; the pre-trained model and the test
images are the same for all. Every contender has the same steps, batches and optimizer; its learning rate is
the one of a grid, the same for all, with the best validation accuracy over all seeds. Repeating the command
leaves out the contenders that the output folder's runs.json has. The recorded runs of `blocks` had other work
beside them, so the times of their steps were taken out of the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments.digits_transfer.data import Images, load_images
from experiments.digits_transfer.pretrain import Pretraining, pretrain
from experiments.digits_transfer.transfer import Transfer, make_method, make_tasks, transfer
from experiments.harness.contenders import Contender, adapter_size, require_equal
from experiments.harness.finetuning import Group, Sizes, contenders
from experiments.harness.plot import draw_accuracies
from experiments.harness.progress import progress_bar
from experiments.harness.record import Run, open_record, provenance
from experiments.harness.report import Report, Results, accuracy_table, best_accuracies, write_report
from peftjax.core import tree


@dataclasses.dataclass(frozen=True)
class Options:
    """The contenders, the model, the task and where the results go."""

    contenders: Group = "plain"
    """Which methods."""
    output: Path | None = None
    """Where the results go; by default the folder of the contenders beside this file."""
    sizes: Sizes = dataclasses.field(default_factory=lambda: Sizes(rank=4, size=28, density=7 / 128))
    """LoRA of rank 4 has 7,168 numbers a block, whose linear weights have 131,072."""
    tolerance: float = 0.05
    """How far apart the numbers of trained parameters may be."""
    pretraining: Pretraining = dataclasses.field(default_factory=Pretraining)
    transfer: Transfer = dataclasses.field(default_factory=Transfer)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.output or Path(__file__).parent / "results" / self.contenders


def main(options: Options) -> None:
    """Compare, write the results and print the table.

    Raises:
        PeftError: scikit-learn is missing, matched contenders train different numbers of parameters, or the
            output folder has runs of other settings.
    """
    chosen = contenders(options.contenders, options.sizes)
    results = compare(load_images(), chosen, options, Console(stderr=True))
    print(write_report(options.folder, REPORT, results))


def compare(images: Images, chosen: Sequence[Contender], options: Options, console: Console) -> Results:
    """Pre-train, and transfer with every contender that has no line in runs.json yet.

    Raises:
        PeftError: matched contenders train numbers of parameters that differ by more than the tolerance, or
            runs.json has other settings.
    """
    settings = {name: dataclasses.asdict(getattr(options, name)) for name in ("pretraining", "transfer")}
    record = open_record(options.folder, settings)
    base = pretrain(images, options.pretraining)
    console.print(f"pre-trained: accuracy {base.accuracy:.3f} on held-out images of the digits 0-4")
    tasks, test = make_tasks(images, base, options.transfer)
    methods = [make_method(contender, base, tasks[0], options.transfer) for contender in chosen]
    sizes = [(one, adapter_size(method, tasks[0].params)) for one, method in zip(chosen, methods)]
    require_equal(sizes, options.tolerance)
    lines = []
    runs_of_each = len(options.transfer.rates) * options.transfer.seeds
    with progress_bar(len(chosen) * runs_of_each, console) as advance:
        for contender in chosen:

            def run(contender: Contender = contender) -> Run:
                return transfer(contender, base, tasks, test, options.transfer, advance)

            lines.append(record.recall({"label": contender.label}, run))
            jax.clear_caches()  # a process can map only so many programs into memory
            scores = ", ".join(f"{score:.3f}" for score in lines[-1]["accuracy"])
            console.print(f"{contender.label}: {scores} at learning rate {lines[-1]['rate']:g}")
    return {
        **provenance("jax", "flax", "optax", "scikit-learn"),
        **settings,
        "pretrained_accuracy": base.accuracy,
        "parameters": tree.count(base.params),
        "head_parameters": tree.count(base.params["head"]["classifier"]),
        "test_images": len(test),
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


REPORT = Report(
    text=lambda results: f"{describe(results)}\n\n{accuracy_table(results['lines'])}",
    draw=draw_accuracies,
    answer=best_accuracies,
)
REPORTS = {"blocks": REPORT, "sparse": REPORT}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
