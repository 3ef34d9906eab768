"""The runs of a long comparison, kept in a file as they finish, so that it can go on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.tuning.report import write_json
from peftjax.core.errors import PeftError
from peftjax.io.files import read_json

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Record:
    """Finished runs, found again by what identifies them."""

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


def open_record(file: Path, settings: Mapping[str, Any]) -> Record:
    """The record in a file, empty where there is none.

    Raises:
        PeftError: its runs have other settings.
    """
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        return Record(file, settings, [])
    found = read_json(file)
    for name in sorted({*settings, *found["settings"]}):
        if (was := found["settings"].get(name)) != settings.get(name):
            raise PeftError(
                f"{file} has runs with {name} {was!r}, not {settings.get(name)!r}: "
                "choose another output folder"
            )
    return Record(file, settings, found["runs"])
