"""The largest step that fits a device, or the cheapest of several ways to take one, by asking its compiler.

    largest     doubling and halving to a size that fits and one that does not, then bisection between the two
    cheapest    every way is compiled; of those that fit the one whose roofline, where known, is lowest

A larger step is taken to need more memory. No compilation begins after the time limit; what was known by then
is what is found.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from peftjax.core.errors import PeftError
from peftjax.core.mesh_axes import ROWS
from peftjax.parallel.mesh import read_mesh
from peftjax.planner.compiling import DoesNotFit
from peftjax.planner.result import Plan

Value = TypeVar("Value", int, str)
Outcome = Literal["fits", "does not fit", "does not compile"]


@dataclass(frozen=True)
class Attempt(Generic[Value]):
    """One step that was compiled.

    Attributes:
        value: its size, mesh or policy.
        outcome: what came of it.
        plan: of what compiles.
        reason: why there is no plan.
        needed: bytes that a device has to have, where that is known.
    """

    value: Value
    outcome: Outcome
    plan: Plan | None = None
    reason: str = ""
    needed: int | None = None


@dataclass(frozen=True)
class Found(Generic[Value]):
    """What a search found.

    Attributes:
        best: the largest or the cheapest of those that fit; None where none does.
        attempts: all, in their order.
        untried: values that the time limit left out, of a cheapest one.
        finished: whether the answer is known: False where the time limit came before.
    """

    best: Attempt[Value] | None
    attempts: tuple[Attempt[Value], ...]
    untried: tuple[Value, ...] = ()
    finished: bool = True


def never() -> bool:
    """The time limit of a search without one."""
    return False


def time_limit(minutes: float | None) -> Callable[[], bool]:
    """Whether so many minutes have passed since this call; None is no limit."""
    end = time.monotonic() + 60 * (minutes or 0)
    return never if minutes is None else lambda: time.monotonic() >= end


def attempt(plan_of: Callable[[Value], Plan], value: Value) -> Attempt[Value]:
    """What comes of a step.

    Raises:
        PeftError: the target's memory is not known.
    """
    try:
        plan = plan_of(value)
    except DoesNotFit as error:
        return Attempt(value, "does not fit", reason=str(error), needed=error.needed)
    except PeftError as error:
        return Attempt(value, "does not compile", reason=str(error))
    if plan.fits is None:
        raise PeftError(f"the memory of {plan.target!r} is not known; choose a target that has a limit")
    return Attempt(value, "fits" if plan.fits else "does not fit", plan, needed=plan.needed)


def largest(
    plan_of: Callable[[int], Plan],
    start: int,
    *,
    unit: int = 1,
    most: int | None = None,
    late: Callable[[], bool] = never,
    tell: Callable[[Attempt[int]], None] = lambda one: None,
) -> Found[int]:
    """The largest multiple of `unit` whose step fits.

    Args:
        plan_of: the plan of a size.
        start: the size to try first, rounded to a multiple.
        unit: what sizes are multiples of.
        most: the largest size that can be.
        late: whether no further compilation may begin.
        tell: called with each attempt.

    Raises:
        PeftError: a size does not compile for another reason than its memory, `most` is less than `unit`, or
            the target's memory is not known.
    """
    top = None if most is None else most // unit
    if top == 0:
        raise PeftError(f"search: the largest size is {most}, which is less than its unit {unit}")
    attempts: list[Attempt[int]] = []
    low, high = 0, None if top is None else top + 1  # in units: what fits, and what does not
    size = max(1, start // unit)
    while (high is None or high - low > 1) and not late():
        size = size if high is None else min(size, high - 1)
        one = attempt(plan_of, size * unit)
        attempts.append(one)
        tell(one)
        if one.outcome == "does not compile":
            raise PeftError(one.reason)
        low, high = (size, high) if one.outcome == "fits" else (low, size)
        growing = all(one.outcome == "fits" for one in attempts)
        size = 2 * low if growing else (low + high) // 2
    best = next((one for one in attempts if one.value == low * unit), None)
    return Found(best, tuple(attempts), finished=high is not None and high - low <= 1)


def cheapest(
    plan_of: Callable[[str], Plan],
    values: Sequence[str],
    *,
    late: Callable[[], bool] = never,
    tell: Callable[[Attempt[str]], None] = lambda one: None,
) -> Found[str]:
    """Of the values whose step fits, the one whose least time is lowest.

    Args:
        plan_of: the plan of a value.
        values: in the order in which they are tried.
        late: whether no further compilation may begin.
        tell: called with each attempt.

    Raises:
        PeftError: the target's memory is not known.
    """
    attempts: list[Attempt[str]] = []
    for value in values:
        if late():
            break
        attempts.append(attempt(plan_of, value))
        tell(attempts[-1])
    fitting = [one for one in attempts if one.outcome == "fits" and one.plan.roofline is not None]
    best = min(fitting, key=lambda one: one.plan.roofline.seconds, default=None)
    untried = tuple(values[len(attempts) :])
    return Found(best, tuple(attempts), untried, finished=not untried)


def meshes(devices: int, rows: int, heads: int) -> list[str]:
    """The meshes over `fsdp` and `tensor` that divide the rows and the heads, least `tensor` first."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0]
    return [f"fsdp={devices // n},tensor={n}" for n in sizes if rows % (devices // n) == 0]


def rows_of(mesh: str | None, devices: int) -> int:
    """What a mesh takes a multiple of: rows of a batch."""
    if mesh is None:
        return 1
    sizes = {"fsdp": devices} if mesh == "all" else read_mesh(mesh)
    return math.prod(sizes.get(axis, 1) for axis in ROWS)
