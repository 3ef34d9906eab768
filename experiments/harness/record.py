"""What is written of an experiment: finished runs, compact results and what they were made with."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.io.files import read_json, replacing

Run = dict[str, Any]
RUNS = "runs.json"
"""The name of the file of finished runs, which git ignores."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Finished runs, recalled by what identifies them."""

    file: Path
    settings: Mapping[str, Any]
    runs: list[Run]

    def recall(self, identity: Mapping[str, Any], run: Callable[[], Run]) -> Run:
        """The recorded run of this identity; else `run()`, which is then recorded with it."""
        for known in self.runs:
            if all(known[name] == value for name, value in identity.items()):
                return known
        self.runs.append({**identity, **run()})
        write_json(self.file, {"settings": self.settings, "runs": self.runs})
        return self.runs[-1]


def open_record(folder: Path, settings: Mapping[str, Any]) -> Record:
    """The record in a folder, empty where there is none.

    Raises:
        PeftError: its runs have other settings.
    """
    file = folder / RUNS
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return Record(file, settings, [])
    found = read_json(file)
    for name in sorted({*settings, *found["settings"]}):
        if (was := found["settings"].get(name)) != settings.get(name):
            raise PeftError(
                f"{file} has runs with {name} {was!r}, not {settings.get(name)!r}: "
                "choose another output folder"
            )
    return Record(file, settings, found["runs"])


def write_json(file: Path, value: Any, levels: int = 2) -> None:
    """Replace the file as a whole, so that a stopped run leaves the earlier one.

    Every entry of the first levels is a line, so that rows are lines.
    """
    with replacing(file) as (new,):
        new.write_text(f"{_lines(value, levels)}\n", encoding="utf-8")


def _lines(value: Any, levels: int, depth: int = 0) -> str:
    if depth == levels or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    if isinstance(value, dict):
        entries = [f"{json.dumps(name)}: {_lines(entry, levels, depth + 1)}" for name, entry in value.items()]
    else:
        entries = [_lines(entry, levels, depth + 1) for entry in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    return f"{start}{inner}{f',{inner}'.join(entries)}{outer}{end}"


def provenance(*packages: str) -> dict[str, Any]:
    """The command, the commit, the machine and the versions of packages, as JSON values.

    Of a path that is one of this machine alone the command has the name.
    """
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.orig_argv[1:]]
    return {
        "command": shlex.join(["python", *words]),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
    }


@cache
def commit() -> str:
    """The commit of this checkout where it is one."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
