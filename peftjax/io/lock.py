"""A folder that one process at a time works in."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from peftjax.core.errors import PeftError

FILE = "at_work.pid"
# What a file system says that has no locks, such as some network ones.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LONGEST = 1000  # bytes read of the file

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def at_work(directory: Path) -> Iterator[None]:
    """Hold `directory`, made where absent, against every other process and run, until the body ends.

    The lock is the operating system's on a file with the process id: a process that dies, however it does,
    leaves the folder free. On a file system without locks the file itself is the lock: it says which process
    made it, when that started and where, and counts as long as it runs.

    Raises:
        PeftError: another one is at work there, or the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(directory)
    except OSError as error:
        raise PeftError(f"cannot write to the folder {directory}: {error.strerror}") from error
    try:
        yield
    finally:
        # While it is still held: whoever opened the file in the meantime sees that it is gone.
        with contextlib.suppress(OSError):
            (directory / FILE).unlink()
        os.close(descriptor)


def _locked(directory: Path) -> int:
    """A descriptor that holds the lock."""
    file = directory / FILE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            has_locks = _lock(descriptor, directory)
            if not has_locks:
                _require_free(descriptor, directory)
            if _is_file(descriptor, file):
                own = str(os.getpid()) if has_locks else _signature()
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, own.encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> bool:
    """Take the lock; whether the file system has locks.

    Raises:
        PeftError: another one has it; names the process.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _held(_words(descriptor)[:1], directory) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _require_free(descriptor: int, directory: Path) -> None:
    """Refuse a file that was written by a process of this machine that still runs; warn of another machine's.

    Raises:
        PeftError: the process is at work.
    """
    words = _words(descriptor)
    if len(words) != 3 or not words[0].isdecimal():
        return
    pid, started, host = words
    if host != socket.gethostname():
        logger.warning(
            "%s: process %s on %s was at work there, on a file system without locks: end it if it still runs",
            directory,
            pid,
            host,
        )
    elif started == _start_of(int(pid)):
        raise _held(words[:1], directory)


def _held(pid: list[str], directory: Path) -> PeftError:
    holder = f"process {pid[0]}" if pid and pid[0].isdecimal() else "another process"
    return PeftError(
        f"{holder} is at work in {directory}: wait until it has ended, or choose another output folder"
    )


def _words(descriptor: int) -> list[str]:
    return os.pread(descriptor, _LONGEST, 0).decode("utf-8", "replace").split()


def _signature() -> str:
    """The id of this process, when it started, since ids are reused, and the machine's name."""
    return f"{os.getpid()} {_start_of(os.getpid())} {socket.gethostname()}"


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks of the machine ('?' where it does not say); None if it has ended."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # it runs, as another user
    try:
        # After the name in parentheses, which may have spaces, come the state and 18 more before the start.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "?"


def _is_file(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one of that name: the process that held it removes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
