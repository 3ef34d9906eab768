"""A folder that one process at a time works in."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from peftjax.errors import PeftError

FILE = "at_work.pid"
# What a file system says that has no locks, such as some network ones.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def at_work(directory: Path) -> Iterator[None]:
    """Hold `directory`, made where absent, against every other process and run, until the body ends.

    The lock is the operating system's on a file with the process id: a process that dies, however it does,
    leaves the folder free.

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
            _lock(descriptor, directory)
            if _is_file(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    """Take the lock.

    Raises:
        PeftError: another one has it; names the process.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        written = os.read(descriptor, 20).decode("ascii", "replace")
        who = f"process {written}" if written.isdecimal() else "another process"
        raise PeftError(
            f"{who} is at work in {directory}: wait until it has ended, or choose another output folder"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_file(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one of that name, and was not removed by the one who held it."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
