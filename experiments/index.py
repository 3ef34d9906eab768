"""Every question with its command and its answer, from the recorded results: `experiments/README.md`.

python -m experiments.index
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import tyro

from experiments.harness.report import NAME, Report, read_results, table

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The recorded results of one folder, with how they are told."""

    question: str
    folder: Path
    report: Report

    def answer(self) -> dict[str, str]:
        """The few numbers that answer the question."""
        return self.report.answer(read_results(self.folder))


@dataclasses.dataclass(frozen=True)
class Options:
    """What is written beside the index."""

    reports: bool = False
    """Also every results.md and results.png, from its results.json."""


def questions() -> dict[str, ModuleType]:
    """The `run` of every folder that has one, by the folder's name."""
    names = sorted(file.parent.name for file in HERE.glob("*/run.py"))
    return {name: importlib.import_module(f"experiments.{name}.run") for name in names}


def recorded() -> Iterator[Recorded]:
    """All recorded results."""
    for name, module in questions().items():
        for results, report in getattr(module, "REPORTS", {}).items():
            yield Recorded(name, HERE / name / "results" / results, report)


def expected(name: str) -> list[str]:
    """The lines of the table of what a question's run is expected to find, as its docstring has them."""
    rows = [
        (one.folder.name, *entry)
        for one in recorded()
        if one.question == name
        for entry in one.answer().items()
    ]
    return table(["results", "of", "is"], rows) if rows else []


def write_index() -> str:
    """The index in Markdown."""
    lines = [
        "# Experiments",
        "",
        "Written by `python -m experiments.index` from the recorded results. A folder is a question: the "
        "head of its `run.py` says what is done, the command and what is expected; `results/` has the "
        "numbers (`results.json`), the tables (`results.md`) and the plot. `harness/` is what all share. A "
        "command writes its finished runs to `runs.json` beside its results, which git ignores, and goes on "
        "from there when it is given again.",
        "",
    ]
    for name, module in questions().items():
        question, *commands = _head(module)
        lines += [f"## {name}", "", question, "", "```bash", *commands, "```", ""]
        for one in (one for one in recorded() if one.question == name):
            answers = "; ".join(f"{of}: {value}" for of, value in one.answer().items())
            path = one.folder.relative_to(HERE)
            lines += [f"- [{one.folder.name}]({path}/{NAME}.md) ([plot]({path}/{NAME}.png)): {answers}."]
        lines += [""] if lines[-1] else []
    return "\n".join(lines)


def _head(module: ModuleType) -> list[str]:
    """The question of a docstring and its commands, of which a line may end in a backslash."""
    text = inspect.cleandoc(module.__doc__ or "")
    indented = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    return [text.splitlines()[0], *(line for line in indented if not line.startswith("|"))]


def main(options: Options) -> None:
    """Write the index."""
    if options.reports:
        for one in recorded():
            results = read_results(one.folder)
            (one.folder / f"{NAME}.md").write_text(one.report.text(results), encoding="utf-8")
            one.report.draw(results, one.folder / f"{NAME}.png")
    (HERE / "README.md").write_text(write_index(), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
