"""A kind of file: how a good one is made, damaged and read; a damaged one must be read or refused."""

import contextlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftjax.core.errors import PeftError

SECONDS = 10  # of a case; a tenth of it is usual


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a good one is made, damaged and read."""

    file: str
    make: Callable[[Path], object]
    damage: Callable
    read: Callable[[Path], object]


# What may stand where a file should, as a link or a half-done copy leaves it.
ACCIDENTS = {
    "nothing": lambda file: None,
    "an empty file": lambda file: file.touch(),
    "a folder": lambda file: file.mkdir(),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a link to nothing": lambda file: file.symlink_to("nowhere"),
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
}


def check_accidents(kind, tmp_path):
    good, work = tmp_path / "good", tmp_path / "work"
    good.mkdir()
    kind.make(good)
    for accident in ACCIDENTS.values():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(good, work)
        (work / kind.file).unlink()
        accident(work / kind.file)
        # Whoever waits for the pipe is let go, and is too late.
        late = threading.Timer(SECONDS, lambda: (work / kind.file).write_text(""))
        late.start()
        start = time.monotonic()
        with warnings.catch_warnings(), contextlib.suppress(PeftError):
            warnings.simplefilter("ignore")
            kind.read(work)
        late.cancel()
        assert time.monotonic() - start < SECONDS


def check(kind, cases, tmp_path):
    good, work = tmp_path / "good", tmp_path / "work"
    good.mkdir()
    kind.make(good)
    kind.read(good)
    content = (good / kind.file).read_bytes()

    @settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def run(data):
        damaged = kind.damage(data.draw, content)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(good, work)
        (work / kind.file).write_bytes(damaged)
        start = time.process_time()
        with warnings.catch_warnings(), contextlib.suppress(PeftError):
            warnings.simplefilter("ignore")
            kind.read(work)
        assert time.process_time() - start < SECONDS

    run()
