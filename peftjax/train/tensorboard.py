"""Scalars for TensorBoard, written by the caller's thread: tensorboardX's own hangs when the disk is full."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from peftjax.io.files import writing

WriteScalar = Callable[[str, float, int], None]
"""`write(name, value, step)` writes one point."""


@contextlib.contextmanager
def open_board(folder: Path, step: int) -> Iterator[WriteScalar]:
    """A new file of events in `folder`, made where absent; TensorBoard forgets older points after `step`.

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
        with contextlib.suppress(OSError):  # what could not be written cannot be at the end either
            events.close()
        raise
    with writing(folder):
        events.close()
