"""Small files: written whole or not at all, and read with errors that name them."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

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
        values = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PeftError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise PeftError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise PeftError(f"{file} holds no JSON object")
    return values


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: when it is not JSON, nests too deeply, or has a character that is no Unicode text.
    """
    try:
        values = json.loads(text)
        # An escaped half of a surrogate pair is accepted by `json` and can be written nowhere.
        json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it has half of a surrogate pair, which is no character") from error
    return values


Schema = TypeVar("Schema")


def read_as(schema: type[Schema], file: Path) -> Schema:
    """The object in a JSON file as a `schema`, a frozen dataclass (or a type that `msgspec` can convert to).

    Raises:
        PeftError: when the file is absent, holds no JSON object, or a field of it is missing, of another
            type or out of the range that its annotation names; it says file, field and what is wanted.
    """
    return checked(schema, read_json(file), file)


def checked(schema: type[Schema], values: Any, where: object) -> Schema:
    """Values that were read from `where`, such as a file, as a `schema`.

    Raises:
        PeftError: when a field is missing, of another type or out of range.
    """
    try:
        return msgspec.convert(values, schema)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        what, _, path = str(error).partition(" - at `$")
        name = path.rstrip("`").lstrip(".")
        field = f"{name!r}: " if name else ""
        raise PeftError(f"{where}: {field}{_with_value(what, values, name)}") from error


def _with_value(what: str, values: Any, name: str) -> str:
    """The complaint and, where the field can be found by its name, the value that it is about."""
    found = values
    for part in re.findall(r"[^.\[\]]+", name):
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        else:
            return what
    text = repr(found)
    return f"{what} ({text if len(text) <= 60 else text[:57] + '...'})"
