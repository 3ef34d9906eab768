"""The arguments of the command line, and an options file, as the options of a command."""

import contextlib
import io
import re
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from peftjax.cli.commands import COMMANDS, Train
from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.train.options_file import read_options


def parse(arguments: list[str]) -> Any:
    """The options of the command that the arguments name.

    Raises:
        PeftError: there is no such command or option, or an option cannot have its value.
    """
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
