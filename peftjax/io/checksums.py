"""Whether the files of a folder are as they were written: their sizes and SHA-256, kept beside them."""

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from peftjax.core.errors import PeftError
from peftjax.io.files import read_as, replacing

FILE = "checksums.json"
_SMALL = 2**20  # bytes of a file that is read even where only the sizes of larger ones are compared


@dataclasses.dataclass(frozen=True)
class Sum:
    """What is known of a file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Sums:
    """The contents of `checksums.json`: the files of a folder, by path in it."""

    files: dict[str, Sum]


def record(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Write `checksums.json` into `folder`, over all files in it but those called as in `leave_out`."""
    sums = {
        file.relative_to(folder).as_posix(): Sum(file.stat().st_size, _digest(file))
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in leave_out
    }
    with replacing(folder / FILE) as (temporary,):
        temporary.write_text(json.dumps(dataclasses.asdict(Sums(sums))) + "\n", encoding="utf-8")


def damage(folder: Path, *, all_bytes: bool = True) -> str | None:
    """What is wrong with the first file that is not as it was recorded; None where all are, or none was.

    Args:
        folder: with `checksums.json`.
        all_bytes: read large files too, instead of comparing their sizes only.

    Raises:
        PeftError: a file is there and cannot be read.
    """
    if not (folder / FILE).exists():
        return None
    try:
        sums = read_as(Sums, folder / FILE)
    except PeftError as error:
        return str(error)
    for name, wanted in sums.files.items():
        file = folder / name
        try:
            size = file.stat().st_size
            if size != wanted.size:
                return f"{name} has {size} bytes and not {wanted.size}"
            if (all_bytes or size <= _SMALL) and _digest(file) != wanted.sha256:
                return f"the bytes of {name} are not those that were written"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except OSError as error:
            raise PeftError(f"cannot read {file}: {error.strerror}") from error
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
