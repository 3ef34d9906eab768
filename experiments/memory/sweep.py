"""Peak memory of a step against depth and against the length of a text, asked of the H200's compiler.

    JAX_PLATFORMS=cpu python -m experiments.memory.sweep

RoBERTa-large, 32 texts a step: 512 tokens and 6 to 48 layers, then 24 layers and 128 to 2,048 tokens. The
weights of the layers are taken off, so that what is left is what grows with depth for another reason. See
`experiments.memory.run` for what must be installed; results of an earlier run stay.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

from experiments.memory.rows import ROWS, Row
from experiments.memory.run import measure
from experiments.memory.subjects import SUBJECTS, Subject
from experiments.tuning.report import write_json

SUBJECT = SUBJECTS[0]
SHOWN = ("full", "LoRA", "LoRA + remat", "LoRA + 4-bit residuals", "LST 1/8", "MEFT1", "MEFT1, no anchors")
Sweep = dict[str, dict[str, int]]
"""Bytes by row and number."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to vary."""

    output: Path = Path("experiments/memory/results")
    """Where sweep.json and sweep.png go."""
    target: str = "h200"
    """The machine."""
    depths: tuple[int, ...] = (6, 12, 24, 48)
    """Numbers of layers."""
    lengths: tuple[int, ...] = (128, 512, 1024, 2048)
    """Tokens of a text."""


def beside_weights(subject: Subject, row: Row, target: str, layers: int | None = None) -> int:
    """The peak without parameters and optimizer state."""
    found = measure(subject, row, target, layers)
    sizes: dict[str, int] = found["bytes"]
    return found["peak"] - sum(sizes[kind] for kind in ("weights", "method_state", "trainable", "optimizer"))


def main(options: Options) -> None:
    """Measure what is missing, and plot."""
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "sweep.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"layers": {}, "tokens": {}}
    for row in (row for row in ROWS if row.name in SHOWN):
        for what, numbers in (("layers", options.depths), ("tokens", options.lengths)):
            found = results[what].setdefault(row.name, {})
            for number in numbers:
                if str(number) in found:
                    continue
                subject = SUBJECT if what == "layers" else dataclasses.replace(SUBJECT, length=number)
                layers = number if what == "layers" else None
                found[str(number)] = beside_weights(subject, row, options.target, layers)
                write_json(file, results)
                print(f"{row.name}, {number} {what}: {found[str(number)] / 2**20:,.0f} MiB", flush=True)
    plot(results, options.output / "sweep.png")


def plot(results: dict[str, Sweep], file: Path) -> None:
    """Two curves of every row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (what, rows) in zip(axes, results.items()):
        for name, found in rows.items():
            numbers = [int(number) for number in found]
            axis.plot(numbers, [size / 2**30 for size in found.values()], "o-", label=name)
        axis.set_xlabel(what)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_ylabel("peak beside weights and optimizer, GiB")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
