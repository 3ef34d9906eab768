"""Checkpoints that are damaged: found before anything is read from them, and renamed, not deleted."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax

from peftjax.core.errors import PeftError
from peftjax.io.checksums import damage
from peftjax.io.files import read_as

COMPLETE = "_CHECKPOINT_METADATA"  # Orbax writes it into a folder it has finished
_MISSING = f"{COMPLETE} is missing"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Marker:
    """What Orbax checks when it rereads `_CHECKPOINT_METADATA`, which no checksum covers."""

    item_handlers: dict[str, str] | str | None = None
    metrics: dict[str, Any] | None = None
    performance_metrics: dict[str, float | None] | None = None
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None
    custom_metadata: dict[str, Any] | None = None


class Unreadable(PeftError):
    """A checkpoint that is there and cannot be read."""


def set_unreadable_aside(directory: Path) -> None:
    """Rename damaged checkpoints out of the way, so that the newest one left is whole.

    Orbax would count them, read their scores, and could delete a whole one to keep them. Of those older
    than the newest whole one only the small files are read; `restore_trainable` reads the others.

    Raises:
        PeftError: there are checkpoints, and none is whole.
    """
    whole: Path | None = None
    reasons: dict[Path, str] = {}
    folders = step_folders(directory)
    for folder in reversed(folders):
        reason = what_is_wrong(folder, all_bytes=whole is None)
        if reason is not None:
            reasons[folder] = reason
        else:
            whole = whole or folder
    if folders and whole is None:
        raise PeftError(none_whole(directory, reasons))
    for folder, reason in reasons.items():
        set_aside(folder, reason)


def step_folders(directory: Path) -> list[Path]:
    """The folders of checkpoints by ascending step, whole or not."""
    if not directory.is_dir():
        return []
    return sorted((f for f in directory.iterdir() if f.name.isdecimal()), key=lambda f: int(f.name))


def what_is_wrong(folder: Path, *, all_bytes: bool = True) -> str | None:
    """What is damaged in a checkpoint's folder, as far as it was recorded; None where nothing is."""
    if not (folder / COMPLETE).exists():
        return _MISSING
    try:
        read_as(_Marker, folder / COMPLETE)
    except PeftError as error:
        return str(error)
    return damage(folder, all_bytes=all_bytes)


def set_aside(folder: Path, reason: str) -> None:
    """Rename a checkpoint's folder to `<step>.unreadable`, or `.incomplete` where it was never finished."""
    if jax.process_index() != 0:
        return
    ending = "incomplete" if reason == _MISSING else "unreadable"
    names = (f"{folder.name}.{ending}{'' if n == 1 else f'.{n}'}" for n in count(1))
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    try:
        folder.rename(aside)
    except OSError as error:
        raise PeftError(f"cannot rename the unreadable checkpoint {folder}: {error.strerror}") from error
    logger.warning(
        "the checkpoint of step %s is unreadable (%s): set aside as %s", folder.name, reason, aside
    )


def none_whole(directory: Path, reasons: Mapping[Path, str]) -> str:
    """The sentence for a folder whose checkpoints, of the keys' names, are all damaged."""
    what = ", ".join(f"step {folder.name} ({reason})" for folder, reason in reasons.items())
    return (
        f"no checkpoint in {directory} can be read: {what}; bring the files back, or "
        "move that folder away to train from the start"
    )
