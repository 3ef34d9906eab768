"""The metrics of a run: a JSON object a line, and scalars for TensorBoard where asked."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from peftjax.core.errors import PeftError
from peftjax.io.files import checked, parse_json, replacing, require_file, writing

Values = Mapping[str, float | int | None]
Write = Callable[[int, Values], None]
"""`write(step, values)` appends one line."""
WriteScalar = Callable[[str, float, int], None]
"""`write(name, value, step)` writes one point."""

FILE = "metrics.jsonl"


@contextmanager
def open_metrics(directory: Path | None, step: int, *, tensorboard: bool) -> Iterator[Write]:
    """Where a run that has done `step` steps writes its metrics; without a folder, nowhere.

    Lines of later steps are removed first: they come from before an interruption, and the same
    steps are about to be repeated. `tensorboard` events go to the folder `tensorboard`.

    Raises:
        PeftError: a line cannot be written, or an old one is damaged.
    """
    if directory is None:
        yield lambda step, values: None
        return
    path = directory / FILE
    cut(path, step)
    with ExitStack() as stack:
        board = stack.enter_context(_open_board(directory / "tensorboard", step)) if tensorboard else None
        with writing(path):
            # Without a buffer, which would be flushed, and fail a second time, when the file is closed.
            file = stack.enter_context(path.open("ab", buffering=0))

        def write(step: int, values: Values) -> None:
            line = (json.dumps({"step": step, **values}) + "\n").encode()
            with writing(path):
                while line:
                    line = line[file.write(line) :]
            for name, value in values.items():
                if board is not None and value is not None:
                    board(name, value, step)

        yield write


@contextmanager
def _open_board(folder: Path, step: int) -> Iterator[WriteScalar]:
    """A new file of events for TensorBoard in `folder`, which forgets older points after `step`.

    The caller's thread writes: tensorboardX's own hangs when the disk is full.

    Raises:
        PeftError: a point cannot be written.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        events = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        events.write_event(Event(step=step + 1, wall_time=time.time(), session_log=start))

    def write(name: str, value: float, step: int) -> None:
        with writing(folder):
            events.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
            events.flush()

    try:
        yield write
    except BaseException:
        with suppress(OSError):  # what could not be written cannot be at the end either
            events.close()
        raise
    with writing(folder):
        events.close()


def cut(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and a last line that was not finished.

    Raises:
        PeftError: another line is damaged; the file stays as it was.
    """
    if not path.exists():
        return
    require_file(path)
    with (
        _named(path),
        replacing(path) as (kept,),
        path.open(encoding="utf-8") as old,
        kept.open("w", encoding="utf-8") as new,
    ):
        new.writelines(text for text, line in _lines(path, old) if text.endswith("\n") and line.step <= step)


@dataclass(frozen=True)
class Line:
    """What is read of a line."""

    step: int
    tokens_per_second: float | None = None
    labels_per_second: float | None = None


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics file.

    Raises:
        PeftError: it cannot be read, or a line of it is damaged.
    """
    require_file(path)
    with _named(path), path.open(encoding="utf-8") as file:
        return [line for _, line in _lines(path, file)]


def _lines(path: Path, file: Iterable[str]) -> Iterator[tuple[str, Line]]:
    """Each line with its text; a last one that was not finished counts as one of step 0."""
    for number, text in enumerate(file, 1):
        if not text.endswith("\n"):
            yield text, Line(0)
            return
        place = f"{path}, line {number}"
        try:
            values = parse_json(text)
        except ValueError as error:
            raise PeftError(f"{place} is damaged: {error}; remove the line or the file") from error
        yield text, checked(Line, values, place)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise PeftError(f"{path} is damaged: {error}; remove the file") from error
    except OSError as error:
        raise PeftError(f"cannot read {path}: {error.strerror}") from error
