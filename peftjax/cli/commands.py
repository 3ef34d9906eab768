"""The commands of `peftjax`: the options of each, and what it does."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from peftjax.adapters.files import read_config
from peftjax.cli import report
from peftjax.cli.generate import Generate, run_generate
from peftjax.cli.peft import Export, Import, run_export, run_import
from peftjax.cli.plan import PlanOptions, run_plan
from peftjax.cli.report import show
from peftjax.parallel.lost import last_words
from peftjax.parallel.processes import LOST_AFTER, is_first, join_processes
from peftjax.train.method import make_method
from peftjax.train.open import LANGUAGE_HEAD, find_base, open_model
from peftjax.train.options import DataOptions, MethodOptions, ModelOptions, RunOptions
from peftjax.train.run import run
from peftjax.train.saved_adapter import evaluate_saved, merge_saved
from peftjax.transform.inspection import inspection
from peftjax.transform.registry import METHODS

_LOST = (
    "peftjax: this process was ended, most likely because another one of the run is lost; the same command, "
    "given to all again, continues from the newest checkpoint in {}"
)


@dataclass(frozen=True)
class Train(RunOptions):
    """Fine-tune an encoder on labeled texts, or a decoder to write chats, completions or running text.

    Without options: MiniLM with LoRA on docstrings of this Python's standard library. The same
    command again continues a run that was stopped.
    """

    config: Path | None = None
    """A YAML file of these options by name, e.g. 'learning_rate: 1e-3'; options given here win."""
    json: bool = False
    """Print the summary as JSON."""
    distributed: bool = False
    """Join the processes of a TPU slice, a JobSet or a SLURM job: one run on all of their devices."""
    coordinator: str | None = None
    """Without such a cluster: HOST:PORT of the first process."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which this one is, from 0."""
    lost_after: int = LOST_AFTER
    """Seconds without a sign of life after which a process counts as lost, and the others end."""


def run_train(command: Train, console: Console) -> None:
    """Train, with a line about each stage, and print the summary."""
    by_hand = command.coordinator, command.processes, command.process
    with contextlib.ExitStack() as stack:
        if command.distributed or any(given is not None for given in by_hand):
            join_processes(*by_hand, lost_after=command.lost_after)
            stack.enter_context(last_words(_LOST.format(command.output)))
        console.quiet = not is_first()
        summary = run(command, say=lambda text: console.print(text, highlight=False, soft_wrap=True))
    if is_first():
        show(command.json, summary, lambda: report.print_summary(summary))


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained adapter on texts of its task."""

    texts: DataOptions = field(default_factory=DataOptions)
    adapter: Path = Path("outputs/adapter")
    """The adapter's folder."""
    model: str | None = None
    """The base model's folder, where it is not the one the adapter was trained on."""
    batch_size: int = 64
    """Texts at a time."""
    untie: bool = False
    """Load a tied output layer as a parameter of its own, where the adapter does not say so itself."""
    mesh: str | None = None
    """All devices by axis, such as 'fsdp=2,tensor=4', or 'all' for fsdp; by default one device."""
    json: bool = False
    """Print the scores as JSON."""


def run_eval(command: Eval, console: Console) -> None:
    """Print the scores of a saved adapter."""
    scores = evaluate_saved(
        command.adapter,
        command.texts,
        model=command.model,
        batch_size=command.batch_size,
        untie=command.untie,
        mesh=command.mesh,
    )
    show(command.json, scores, lambda: report.print_values(scores))


@dataclass(frozen=True)
class Merge:
    """Merge a trained adapter into its model and write a Hugging Face folder."""

    output: Path
    """The folder to write; the base model and the adapter stay as they are."""
    adapter: Path = Path("outputs/adapter")
    """The adapter's folder."""
    model: str | None = None
    """The base model's folder, where it is not the one the adapter was trained on."""
    untie: bool = False
    """Load a tied output layer as a parameter of its own, where the adapter does not say so itself."""
    mesh: str | None = None
    """All devices by axis, such as 'fsdp=2,tensor=4', or 'all' for fsdp; by default one device."""
    json: bool = False
    """Print the result as JSON."""


def run_merge(command: Merge, console: Console) -> None:
    """Write the merged folder, and print where it is."""
    merge_saved(command.adapter, command.output, model=command.model, untie=command.untie, mesh=command.mesh)
    result = {"adapter": str(command.adapter), "merged": str(command.output)}
    show(command.json, result, lambda: report.print_values(result))


@dataclass(frozen=True)
class Methods:
    """List the methods: paper, what is trained, what the backward pass keeps."""

    markdown: bool = False
    """As a Markdown table."""
    json: bool = False
    """As JSON."""


def run_methods(command: Methods, console: Console) -> None:
    """Print the registry."""
    if command.markdown:
        print(report.methods_markdown(METHODS))
        return
    rows = [report.method_row(info) for info in METHODS.values()]
    show(command.json, rows, lambda: report.print_methods(METHODS))


@dataclass(frozen=True)
class Inspect:
    """Show a model's parameters and what a method would train, without training."""

    base: ModelOptions = field(default_factory=ModelOptions)
    tuning: MethodOptions = field(default_factory=MethodOptions)
    adapter: Path | None = None
    """Show what this trained adapter holds instead."""
    json: bool = False
    """As JSON."""


def run_inspect(command: Inspect, console: Console) -> None:
    """Print the parameters, or what `adapter.json` holds."""
    if command.adapter is not None:
        config = read_config(command.adapter)
        show(command.json, config, lambda: print(yaml.safe_dump(config, sort_keys=False), end=""))
        return
    base = find_base(command.base.model)
    writes = command.base.head in (None, LANGUAGE_HEAD) and base.is_decoder
    _, params = open_model(base, command.base, num_labels=None if writes else 2)
    method = make_method(command.tuning, steps=100)  # any number: what is trained does not depend on it
    found = inspection(method, params)
    show(command.json, found, lambda: report.print_inspection(found))


COMMANDS: dict[str, type] = {
    "train": Train,
    "eval": Eval,
    "merge": Merge,
    "export": Export,
    "import": Import,
    "generate": Generate,
    "methods": Methods,
    "inspect": Inspect,
    "plan": PlanOptions,
}
"""The options of each command by its name."""

RUN: dict[type, Callable[[Any, Console], None]] = {
    Train: run_train,
    Eval: run_eval,
    Merge: run_merge,
    Export: run_export,
    Import: run_import,
    Generate: run_generate,
    Methods: run_methods,
    Inspect: run_inspect,
    PlanOptions: run_plan,
}
"""What each does, given its options and where lines about its stages go."""
