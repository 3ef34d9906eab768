"""Ends a run within seconds of SIGINT or SIGTERM, even while a step compiles or a checkpoint is written.

SIGTERM comes from a scheduler that takes the machine away: while a run trains, it is saved first.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax

from peftjax.io.unreadable import COMPLETE, step_folders

GRACE: Mapping[int, float] = {signal.SIGINT: 5.0, signal.SIGTERM: 20.0}
"""Seconds to end by itself after each signal; GKE and SLURM give 25 to 30 after SIGTERM."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Preempted(Interrupted):
    """SIGTERM asked the program to end, and the step at which it did is saved."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)


@contextlib.contextmanager
def ends_within(say_last: Callable[[], None], grace: Mapping[int, float] = GRACE) -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted` in the body; if it does not end in time, the process is ended.

    Python runs its handlers between two of its own instructions, so never during a long call of the
    compiler or of a file system. The wake-up descriptor is written to by the operating system's own
    handler, and a thread reads it.

    Args:
        say_last: called before the process is ended, from another thread.
        grace: seconds from each signal to that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] in grace and not over.wait(grace[number[0]]):
                say_last()
                os._exit(128 + number[0])
            if over.is_set():
                return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    thread = threading.Thread(target=watch, name="peftjax-signals", daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, interrupt) for number in grace}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        over.set()
        os.close(writing)  # the thread reads the end of the pipe
        thread.join()
        os.close(reading)


@contextlib.contextmanager
def stop_requests(agreed: Callable[[int], bool]) -> Iterator[Callable[[int], bool]]:
    """What to ask after each step: whether SIGTERM has come, so that the run is to be saved and ended.

    In the body the signal interrupts nothing; a second one does. To several processes JAX listens itself once
    they have joined: one that gets the signal tells the others, and all stop at the same step.

    Args:
        agreed: whether the processes have agreed on this step, such as a `CheckpointManager`'s
            `reached_preemption`.
    """
    if jax.process_count() > 1:
        yield agreed
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise Interrupted(number)
        asked = True

    handler = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: asked
    finally:
        signal.signal(signal.SIGTERM, handler)


def what_is_saved(output: Path) -> str:
    """The end of a sentence on the newest finished checkpoint of a run on disk."""
    saved = [folder for folder in step_folders(output / "checkpoints") if (folder / COMPLETE).exists()]
    if not saved:
        return f"no checkpoint in {output} yet; the same command starts again"
    return f"step {saved[-1].name} is saved in {output}; the same command continues from there"


def end_at_once(code: int) -> NoReturn:
    """End the process without the interpreter's clean-up, which can crash under a step that still runs."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def without_late_ends() -> Iterator[None]:
    """Silence writes that end after Orbax has given up on them: it raises their error itself."""
    hook = sys.unraisablehook

    def heard(raised: Any) -> None:
        error = raised.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            hook(raised)

    sys.unraisablehook = heard
    try:
        yield
    finally:
        sys.unraisablehook = hook
