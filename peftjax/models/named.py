"""Configurations of known models, without weights: what `peftjax plan` takes a name for.

`named/NAME.json` has the settings of the `config.json` of the repository that its `_name_or_path` names.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from peftjax.io.files import read_json

_SUFFIX = ".json"


def named_models() -> list[str]:
    """All names, such as "llama-3-8b"."""
    files = (resources.files("peftjax.models") / "named").iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


def named_config(name: str) -> dict[str, Any]:
    """The settings of `config.json` of a name among `named_models`."""
    with resources.as_file(resources.files("peftjax.models") / "named" / f"{name}{_SUFFIX}") as file:
        return read_json(Path(file))
