"""The command line: `peftjax train | eval | merge | generate | export | import | methods | inspect`."""

import contextlib
import io
import json
import logging
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import tyro
import yaml
from rich.console import Console
from rich.logging import RichHandler

from peftjax.adapters.files import read_config
from peftjax.cli import report
from peftjax.cli.generate import GenerateOptions, run_generate
from peftjax.cli.peft import export_saved, import_saved
from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.train.interrupt import end_at_once, ends_within, what_is_saved, without_late_ends
from peftjax.train.method import make_method
from peftjax.train.open import LANGUAGE_HEAD, find_base, open_model
from peftjax.train.options import DataOptions, MethodOptions, ModelOptions, RunOptions
from peftjax.train.options_file import read_options
from peftjax.train.run import run
from peftjax.train.saved_adapter import evaluate_saved, merge_saved
from peftjax.transform.inspection import inspection
from peftjax.transform.registry import METHODS


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
    json: bool = False
    """Print the scores as JSON."""


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
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Export:
    """Write a trained adapter in the format of Hugging Face's PEFT."""

    output: Path
    """The folder to write, for PeftModel.from_pretrained."""
    adapter: Path = Path("outputs/adapter")
    """The adapter's folder."""
    model: str | None = None
    """The base model's folder, where it is not the one the adapter was trained on."""
    base: str | None = None
    """The base model's name to write into the configuration; by default its folder."""
    leave_out: tuple[str, ...] = ()
    """Parameters or modules that are not written though they are trained, such as 'head'."""
    untie: bool = False
    """Load a tied output layer as a parameter of its own, where the adapter does not say so itself."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Import:
    """Read an adapter of Hugging Face's PEFT into a folder for eval, merge and export."""

    peft: Path
    """The folder with adapter_config.json and adapter_model.safetensors."""
    model: str
    """The base model: a Hugging Face folder, or 'minilm'."""
    output: Path = Path("outputs/adapter")
    """The adapter's folder to write."""
    head: str | None = None
    """The model's head; by default the one of the adapter's task and class."""
    labels: tuple[str, ...] = ()
    """The labels' names in the order of the classifier's outputs; by default the base model's."""
    max_length: int | None = None
    """Tokens of a text at most, when the adapter is evaluated; by default its task's."""
    leave_out: tuple[str, ...] = ()
    """Modules of the file that are not read."""
    vocab_size: int | None = None
    """Resize the base model's vocabulary to so many tokens, as the adapter's training did."""
    untie: bool = False
    """Load the model with a tied output layer as a parameter of its own, for an adapter that changes it apart
    from the word table."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Generate(GenerateOptions):
    """Let a decoder continue a prompt, or each prompt of a file."""

    json: bool = False
    """Print the texts as JSON, one entry a prompt."""


@dataclass(frozen=True)
class Methods:
    """List the methods: paper, what is trained, what the backward pass keeps."""

    markdown: bool = False
    """As a Markdown table."""
    json: bool = False
    """As JSON."""


@dataclass(frozen=True)
class Inspect:
    """Show a model's parameters and what a method would train, without training."""

    base: ModelOptions = field(default_factory=ModelOptions)
    tuning: MethodOptions = field(default_factory=MethodOptions)
    adapter: Path | None = None
    """Show what this trained adapter holds instead."""
    json: bool = False
    """As JSON."""


COMMANDS = {
    "train": Train,
    "eval": Eval,
    "merge": Merge,
    "export": Export,
    "import": Import,
    "generate": Generate,
    "methods": Methods,
    "inspect": Inspect,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input is one sentence on standard error and exit code 2.

    Args:
        arguments: without the program's name; by default the process's own, which an interrupt then ends.
    """
    of_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.addFilter(_without_traceback)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    command = None
    try:
        command = _parse(arguments)
        with ends_within(lambda: _say_interrupted(command, console)), without_late_ends():
            _RUN[type(command)](command, console)
    except PeftError as error:
        _refuse(str(error))
    except OSError as error:  # of any file: the disk is full, the folder read-only, the name too long
        where = f"{error.filename}: " if error.filename is not None else ""
        _refuse(f"{where}{error.strerror or error}")
    except KeyboardInterrupt as error:
        _say_interrupted(command, console)
        code = 128 + getattr(error, "number", signal.SIGINT)
        if of_process:
            end_at_once(code)
        sys.exit(code)


def _without_traceback(record: logging.LogRecord) -> bool:
    """What a library logs of an exception that it raises too: its line alone, and of an interrupt nothing."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    record.exc_info = record.exc_text = None
    return not isinstance(error, KeyboardInterrupt)


def _refuse(sentence: str) -> NoReturn:
    print(f"peftjax: {' '.join(str(PeftError(sentence)).splitlines())}", file=sys.stderr)
    sys.exit(2)


def _say_interrupted(command: Any, console: Console) -> None:
    """What a run has saved; called from any thread, and perhaps while a bar is drawn."""
    console.show_cursor()
    saved = f": {what_is_saved(command.output)}" if isinstance(command, Train) else ""
    print(f"peftjax: interrupted{saved}", file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> Any:
    if arguments[:1] == ["train"]:
        arguments = ["train", *_config_arguments(arguments[1:]), *arguments[1:]]
    if any("\0" in argument for argument in arguments):
        raise PeftError("an argument has a zero byte, which no file's name can have")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                args=arguments,
                prog="peftjax",
                description="Parameter- and memory-efficient fine-tuning in JAX.",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
                use_underscores=False,
            )
    except SystemExit as ended:
        if not ended.code:  # the help was asked for
            raise
        raise PeftError(_sentence(said.getvalue())) from None


def _sentence(box: str) -> str:
    """What tyro says of arguments it does not accept, without the frame around it."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    kept = [line for line in lines if line and not set(line) & set("╭╰─")]
    return " ".join(" ".join(kept).split())[:1000] or "the arguments cannot be read; see peftjax --help"


def _config_arguments(arguments: list[str]) -> list[str]:
    """The options of the YAML file that `--config` names, as arguments to come before the given ones.

    Raises:
        PeftError: the file cannot be read, is no mapping, or names an unknown option.
    """
    values = [given for flag, given in pairwise(arguments) if flag == "--config"]
    values += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    if not values:
        return []
    file = Path(values[-1])
    options = read_options(file)
    known = _option_names(Train) - {"config"}
    result = []
    for name, value in options.items():
        if name not in known:
            raise PeftError(f"{file}: unknown option {name!r}; closest: {nearest(str(name), sorted(known))}")
        flag = str(name).replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            parts = [str(part) for part in value]
            if flags := [part for part in parts if part.startswith("--")]:
                raise PeftError(f"{file}: {name} has {flags[0]!r}, which would be read as another option")
            result += [f"--{flag}", *parts]
        else:
            result.append(f"--{flag}={value}")
    return result


def _option_names(options: type) -> set[str]:
    names: set[str] = set()
    for f in fields(options):
        names |= _option_names(f.type) if is_dataclass(f.type) else {f.name}
    return names


def _train(command: Train, console: Console) -> None:
    summary = run(command, say=lambda text: console.print(text, highlight=False, soft_wrap=True))
    _show(command.json, summary, lambda: report.print_summary(summary))


def _eval(command: Eval, console: Console) -> None:
    scores = evaluate_saved(
        command.adapter,
        command.texts,
        model=command.model,
        batch_size=command.batch_size,
        untie=command.untie,
    )
    _show(command.json, scores, lambda: report.print_values(scores))


def _merge(command: Merge, console: Console) -> None:
    merge_saved(command.adapter, command.output, model=command.model, untie=command.untie)
    result = {"adapter": str(command.adapter), "merged": str(command.output)}
    _show(command.json, result, lambda: report.print_values(result))


def _export(command: Export, console: Console) -> None:
    export_saved(
        command.adapter,
        command.output,
        model=command.model,
        base=command.base,
        leave_out=command.leave_out,
        untie=command.untie,
    )
    result = {"adapter": str(command.adapter), "exported": str(command.output)}
    _show(command.json, result, lambda: report.print_values(result))


def _import(command: Import, console: Console) -> None:
    result = import_saved(
        command.peft,
        command.model,
        command.output,
        head=command.head,
        labels=command.labels,
        max_length=command.max_length,
        leave_out=command.leave_out,
        untie=command.untie,
        vocab_size=command.vocab_size,
    )
    _show(command.json, result, lambda: report.print_values(result))


def _generate(command: Generate, console: Console) -> None:
    live = sys.stdout.isatty() and not command.json
    written = run_generate(command, (lambda text: print(text, end="", flush=True)) if live else None)
    _show(command.json, written, lambda: report.print_written(written))


def _methods(command: Methods, console: Console) -> None:
    if command.markdown:
        print(report.methods_markdown(METHODS))
        return
    rows = [report.method_row(info) for info in METHODS.values()]
    _show(command.json, rows, lambda: report.print_methods(METHODS))


def _inspect(command: Inspect, console: Console) -> None:
    if command.adapter is not None:
        config = read_config(command.adapter)
        _show(command.json, config, lambda: print(yaml.safe_dump(config, sort_keys=False), end=""))
        return
    base = find_base(command.base.model)
    writes = command.base.head in (None, LANGUAGE_HEAD) and base.is_decoder
    _, params = open_model(base, command.base, num_labels=None if writes else 2)
    method = make_method(command.tuning, steps=100)  # any number: what is trained does not depend on it
    found = inspection(method, params)
    _show(command.json, found, lambda: report.print_inspection(found))


def _show(as_json: bool, value: Any, show: Any) -> None:
    if as_json:
        print(json.dumps(value, indent=2))
    else:
        show()


_RUN = {
    Train: _train,
    Eval: _eval,
    Merge: _merge,
    Generate: _generate,
    Export: _export,
    Import: _import,
    Methods: _methods,
    Inspect: _inspect,
}
