"""The plots that several experiments have."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.harness.report import Results, deviation

KINDS = ("weights", "method_state", "trainable", "optimizer", "temporaries")
COLORS = dict(zip(KINDS, ("#4c566a", "#8fa1b3", "#1b6ca8", "#7fb3d5", "#c8553d")))


@contextmanager
def saved(
    file: Path, columns: int = 1, *, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """A figure and its axes, one beside the other, that is written to the file in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False, **options)
    yield figure, axes[0]
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def stacked_bars(axis: Any, plans: Mapping[str, Mapping[str, Any]], unit: int) -> None:
    """The memory of a step by kind: a bar for every plan, the first on top, in `unit` bytes."""
    names = list(plans)
    left = [0.0] * len(names)
    for kind in KINDS:
        sizes = [plans[name]["bytes"][kind] / unit for name in names]
        axis.barh(names, sizes, left=left, color=COLORS[kind], label=kind.replace("_", " "))
        left = [start + size for start, size in zip(left, sizes)]
    axis.invert_yaxis()


def draw_accuracies(results: Results, file: Path) -> None:
    """Every seed's accuracy as a small dot, the mean with its standard deviation as a large one."""
    lines = results["lines"]
    with saved(file, size=(7, 0.8 + 0.32 * len(lines))) as (_, (axis,)):
        for place, line in enumerate(lines):
            color = "#1b6ca8" if line["matched"] else "#8a8a8a"
            scores = [100 * score for score in line["accuracy"]]
            axis.scatter(scores, [place] * len(scores), s=12, color=color, alpha=0.4, linewidths=0)
            mean, spread = statistics.mean(scores), deviation(scores)
            axis.errorbar(mean, place, xerr=spread, fmt="o", color=color, capsize=3)
        axis.set_yticks(range(len(lines)), [f"{line['label']} ({line['trained']:,})" for line in lines])
        axis.invert_yaxis()
        axis.set_xlabel("test accuracy, %: seeds, mean and standard deviation")
        axis.grid(axis="x", alpha=0.3)
