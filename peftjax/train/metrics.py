"""The metrics of a run: one JSON object per line, and TensorBoard where asked."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peftjax.io.files import replacing

Values = Mapping[str, float | int | None]
Write = Callable[[int, Values], None]
"""`write(step, values)` appends one line."""

FILE = "metrics.jsonl"


@contextmanager
def open_metrics(directory: Path | None, step: int, *, tensorboard: bool) -> Iterator[Write]:
    """Where a run that has done `step` steps writes its metrics; without a folder, nowhere.

    Lines of later steps are removed first: they come from before an interruption, and the same
    steps are about to be repeated. `tensorboard` events go to the folder `tensorboard`.
    """
    if directory is None:
        yield lambda step, values: None
        return
    path = directory / FILE
    cut(path, step)
    board = None
    if tensorboard:
        from tensorboardX import SummaryWriter

        board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
    with path.open("a", encoding="utf-8") as file:

        def write(step: int, values: Values) -> None:
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            for name, value in values.items():
                if board is not None and value is not None:
                    board.add_scalar(name, value, step)

        try:
            yield write
        finally:
            if board is not None:
                board.close()


def cut(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and a last line that was not finished."""
    if not path.exists():
        return
    with (
        replacing(path) as (kept,),
        path.open(encoding="utf-8") as old,
        kept.open("w", encoding="utf-8") as new,
    ):
        new.writelines(line for line in old if line.endswith("\n") and json.loads(line)["step"] <= step)
