"""Small files: written whole or not at all, and read with errors that name them."""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from peftjax.core.errors import PeftError


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Give a temporary name beside each of `paths`; move them all into place if the body succeeds.

    Their folders are made where absent. The files that were there stay untouched when the body raises.

    Raises:
        PeftError: they cannot be written.
    """
    temporaries = tuple(path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths)
    try:
        with writing(paths[0]):
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            yield temporaries
            for temporary, path in zip(temporaries, paths):
                os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):  # it says nothing that the error before has not said
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a PeftError about `path`, a file or a folder, for what the system refuses in the body.

    Raises:
        PeftError: the disk or a quota is full, the folder read-only, a name too long.
    """
    try:
        yield
    except OSError as error:
        raise _Unwritten(path, error.strerror or str(error)) from error
    except _Unwritten as error:  # of a temporary name: the caller knows the one that was meant
        raise _Unwritten(path, error.reason) from error


class _Unwritten(PeftError):
    """A file or a folder cannot be written."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"cannot write {path}: {reason}; make room, allow writing there, or choose another folder"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PeftError: when the file is absent or holds no JSON object.
    """
    require_file(file)
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PeftError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise PeftError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise PeftError(f"{file} holds no JSON object")
    return values


def require_file(path: Path) -> None:
    """Refuse a pipe or a device, which could be read forever.

    Raises:
        PeftError: there is something of that name that is neither a file nor a folder.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # of a zero byte
        return  # reading it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise PeftError(f"cannot read {path}: it is a pipe or a device and no file")


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
