"""A table of what the compiler says, a row after the other, beside the rows of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.tuning.report import write_json

Found = dict[str, Any]
Table = dict[str, dict[str, Found]]


def fill_table(
    output: Path,
    rows: Iterable[tuple[str, str, Callable[[], Found]]],
    report: Callable[[Table], str],
    plot: Callable[[Table, Path], None],
) -> None:
    """Measure `(model, method, measure)` one by one, and write memory.json, memory.md and memory.png.

    What is measured is written after every row. Rows of an earlier run stay where this one has none.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "memory.json"
    results: Table = json.loads(file.read_text()) if file.exists() else {}
    for model, method, measure in rows:
        found = measure()
        results.setdefault(model, {})[method] = found
        write_json(file, results)
        print(f"{model}, {method}: {_said(found)}", flush=True)
    written = report(results)
    (output / "memory.md").write_text(written)
    plot(results, output / "memory.png")
    print(written)


def _said(found: Found) -> str:
    """The peak of a step and those of what is done between steps, or why there is none."""
    if "peak" not in found:
        return found["reason"]
    return ", ".join(f"{peak / 2**20:,.0f} MiB" for peak in (found["peak"], *found["between"]))
