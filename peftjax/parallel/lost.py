"""What is said when a process of a run is lost: those that are left cannot go on without it, and end."""

import contextlib
import subprocess
from collections.abc import Iterator

import jax

from peftjax.core.errors import LostProcess

# How errors of collectives and of JAX's coordination service begin or go on when another process is gone.
_SIGNS = (
    "Gloo",
    "NCCL",
    "UNAVAILABLE",
    "ABORTED",
    "DEADLINE_EXCEEDED",
    "Connection closed",
    "Connection reset",
    "Socket closed",
    "heartbeat",
)


@contextlib.contextmanager
def names_lost() -> Iterator[None]:
    """Raise a LostProcess for what JAX raises in the body when another process of the run is gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        if jax.process_count() == 1 or not any(sign in reason for sign in _SIGNS):
            raise
        raise LostProcess(f"another process of the run is lost ({reason[:200]})") from error


@contextlib.contextmanager
def last_words(sentence: str) -> Iterator[None]:
    """Has the sentence said on standard error if this process is ended in the body without a word of its own.

    JAX ends a process from a thread of C++ when another one is lost, and a system that is out of memory kills
    it: nothing of Python runs then. So a shell of its own waits for the end of a pipe.
    """
    try:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r word || printf "%s\\n" "$0" >&2', sentence],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # what ends this process's group does not end it
        )
    except OSError:  # an image without a shell
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            shell.communicate(b"none\n")
