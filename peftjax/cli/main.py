"""The program `peftjax`: one command a run, and how it ends."""

import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.logging import RichHandler

from peftjax.cli.commands import RUN, Train
from peftjax.cli.parse import parse
from peftjax.core.errors import LostProcess, PeftError
from peftjax.parallel.processes import leave_processes
from peftjax.train.interrupt import Preempted, end_at_once, ends_within, what_is_saved, without_late_ends


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input is one sentence on standard error and exit code 2.

    Args:
        arguments: without the program's name; by default the process's own, which an interrupt then ends.
    """
    of_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.addFilter(_worth_saying)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    command = None
    try:
        command = parse(arguments)
        with ends_within(lambda: _say_interrupted(command, console)), without_late_ends():
            RUN[type(command)](command, console)
    except LostProcess as error:
        print(f"peftjax: {error}: {what_is_saved(command.output)}", file=sys.stderr)
        end_at_once(1)
    except PeftError as error:
        _refuse(str(error))
    except OSError as error:  # of any file: the disk is full, the folder read-only, the name too long
        where = f"{error.filename}: " if error.filename is not None else ""
        _refuse(f"{where}{error.strerror or error}")
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        leave_processes()
        end_at_once(1)
    except KeyboardInterrupt as error:
        _say_interrupted(command, console)
        if isinstance(error, Preempted):
            leave_processes()
        code = 128 + getattr(error, "number", signal.SIGINT)
        if of_process:
            end_at_once(code)
        sys.exit(code)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Log exceptions that a library also raises without their traceback, and interrupts not at all."""
    if "Reached preemption sync point" in str(record.msg):  # of Orbax, several times; the end says it
        return False
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    record.exc_info = record.exc_text = None
    return not isinstance(error, KeyboardInterrupt)


def _refuse(sentence: str) -> NoReturn:
    print(f"peftjax: {' '.join(str(PeftError(sentence)).splitlines())}", file=sys.stderr)
    if jax.distributed.is_initialized():
        leave_processes()
        end_at_once(2)
    sys.exit(2)


def _say_interrupted(command: Any, console: Console) -> None:
    """What a run has saved; called from any thread, and perhaps while a bar is drawn."""
    console.show_cursor()
    saved = f": {what_is_saved(command.output)}" if isinstance(command, Train) else ""
    print(f"peftjax: interrupted{saved}", file=sys.stderr, flush=True)
