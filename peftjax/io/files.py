"""Small files: written whole or not at all, and read with errors that name them."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftjax.errors import PeftError


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Give a temporary name beside each of `paths`; move them all into place if the body succeeds.

    The files that were there stay untouched when the body raises.
    """
    temporaries = tuple(path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths)
    try:
        yield temporaries
        for temporary, path in zip(temporaries, paths):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PeftError: when the file is absent or holds no JSON object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PeftError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise PeftError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise PeftError(f"{file} holds no JSON object")
    return values
