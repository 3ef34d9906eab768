"""The progress of a run for whoever watches: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, Mapping[str, float | int | None]], None]
"""`report(step, values)` shows that `step` steps are done."""

SHOWN = {
    "loss": "loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "eval_loss": "eval loss {:.4f}",
    "eval_accuracy": "eval accuracy {:.4f}",
}


@contextmanager
def show_progress(total: int, step: int, console: Console | None = None) -> Iterator[Report]:
    """Shows a run of `total` steps of which `step` are done; yields what to call with news."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield lambda step, values: console.print(
            f"step {step}/{total}: {describe(values)}", soft_wrap=True, highlight=False
        )
        return
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=step)
        latest: dict[str, float | int | None] = {}

        def report(step: int, values: Mapping[str, float | int | None]) -> None:
            latest.update(values)
            bar.update(task, completed=step, description=describe(latest))

        yield report


def describe(values: Mapping[str, float | int | None]) -> str:
    """The values worth watching, as one short line.

    >>> describe({"loss": 0.5, "grad_norm": 3.0, "tokens_per_second": 12345.6})
    'loss 0.5000, 12,346 tokens/s'
    """
    known = [(text, values.get(name)) for name, text in SHOWN.items()]
    return ", ".join(text.format(value) for text, value in known if value is not None)
