"""How long several calls take, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Call = Callable[[], Any]
"""Does its work once and returns arrays, not yet waited for."""


def measure_in_turn(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one of every label a round.

    Other work on the machine then falls on all alike. What a label takes for its first call, which compiles,
    is not counted.

    Args:
        calls: by label.
        rounds: counted calls of each.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            seconds[label].append(time.perf_counter() - started)
    return seconds


def repeated(step: Callable[[Any], Any], state: Any) -> Call:
    """One step after the other, each taking the memory of what the one before returned."""
    state = jax.tree.map(jnp.copy, state)

    def call() -> Any:
        nonlocal state
        state = step(state)
        return state

    return call
