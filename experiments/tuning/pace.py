"""How long a step of each of several methods takes, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from experiments.markdown import table
from peftjax.transform.frozen import Trainable

Step = Callable[[], Trainable]
"""Does one step and returns what it trained, not yet waited for."""


def measure_pace(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each method's steps, one step of every method a round.

    Other work on the machine then falls on all methods alike. What a method takes for its first step,
    which compiles, is not counted.

    Args:
        steps: by label.
        rounds: counted steps of each.
    """
    for step in steps.values():
        jax.block_until_ready(step())
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            started = time.perf_counter()
            jax.block_until_ready(step())
            seconds[label].append(time.perf_counter() - started)
    return seconds


def pace_table(seconds: Mapping[str, Sequence[float]], base: str) -> str:
    """The medians, and how many times the base's step a step takes: median, and smallest to largest round."""
    rows = []
    for label, taken in seconds.items():
        ratios = [own / of_base for own, of_base in zip(taken, seconds[base])]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        rows.append([label, f"{1000 * statistics.median(taken):.0f}", spread])
    return "\n".join(table(["method", "ms a step", f"/ {base}"], rows)) + "\n"
