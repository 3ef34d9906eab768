"""`peftjax plan --search`: the largest batch, longest row, cheapest mesh or remat policy that fits."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from peftjax.core.errors import PeftError
from peftjax.planner.machine import find_machine
from peftjax.planner.result import Plan
from peftjax.planner.search import Attempt, Found, cheapest, largest, meshes, rows_of, time_limit

Question = Literal["batch", "length", "mesh", "remat"]
TOKENS = 128
"""What the lengths that are tried are multiples of."""
POLICIES = (
    "none",
    "dots_with_no_batch_dims_saveable",
    "save_attention",
    "nothing_saveable",
    "offload_attention",
)
"""From the one that recomputes least."""
NAMES = {"batch": "batch_size", "length": "max_length", "mesh": "mesh", "remat": "remat"}


def searched(
    options: Any, planned: Callable[[Any], Plan], longest: int | None, heads: int, console: Console
) -> Found[Any]:
    """The answer to `options.search`, with a line on the console about each compilation.

    Args:
        options: of `peftjax plan`.
        planned: the plan of such options.
        longest: tokens that the model was made for; None of a model without tokens.
        heads: of its attention.
        console: where the lines go.

    Raises:
        PeftError: an option cannot be used, or no memory of the target is known.
    """
    late = time_limit(options.time_limit)
    devices = len(find_machine(options.target).devices)
    unit = rows_of(options.mesh, devices)

    def plan_of(value: Any) -> Plan:
        with console.status(f"{options.search} {value}"):
            return planned(dataclasses.replace(options, **{NAMES[options.search]: value}))

    def tell(one: Attempt[Any]) -> None:
        console.print(f"{options.search} {one.value}: {one.outcome}, {gib(one.needed)}", highlight=False)

    match options.search:
        case "batch":
            return largest(plan_of, options.batch_size, unit=unit, late=late, tell=tell)
        case "length":
            if longest is None:
                raise PeftError(f"{options.base.model} reads no tokens, so that no length can be searched")
            step = min(TOKENS, longest)
            return largest(plan_of, options.max_length or step, unit=step, most=longest, late=late, tell=tell)
        case "mesh":
            return cheapest(plan_of, meshes(devices, options.batch_size, heads), late=late, tell=tell)
        case "remat":
            return cheapest(plan_of, POLICIES, late=late, tell=tell)


def gib(size: int | None) -> str:
    """Bytes as text."""
    return "of unknown size" if size is None else f"{size / 2**30:,.2f} GiB"


def search_values(found: Found[Any]) -> dict[str, Any]:
    """A search as JSON values; the best plan is among the attempts."""
    return {
        "best": None if found.best is None else found.best.value,
        "finished": found.finished,
        "untried": list(found.untried),
        "attempts": [dataclasses.asdict(one) for one in found.attempts],
    }


def ended(question: Question, found: Found[Any]) -> str:
    """What is not known of a search that the time limit ended."""
    refused = [one.value for one in found.attempts if one.outcome == "does not fit"]
    rest = f"; not tried: {', '.join(map(str, found.untried))}" if found.untried else ""
    if question in ("batch", "length"):
        rest = f"; {min(refused)} does not fit" if refused else "; more may fit"
    return f" (the time limit ended the search{rest})"


def _network(one: Attempt[Any]) -> float:
    """The least time on the links, infinite where it is not known."""
    bound = None if one.plan is None else one.plan.roofline
    return float("inf") if bound is None else bound.network


def print_search(question: Question, found: Found[Any]) -> None:
    """The attempts as a table (meshes by their network's time), the answer, and the best one's plan."""
    attempts = list(found.attempts)
    if question == "mesh":
        attempts.sort(key=_network)
    table = Table(question, "outcome", "needs", "at least, s", "network, s", "at most")
    for one in attempts:
        bound = None if one.plan is None else one.plan.roofline
        if bound is None:
            table.add_row(str(one.value), one.outcome, gib(one.needed))
            continue
        rate = f"{one.plan.most_per_second:,.0f} {one.plan.unit}/s"
        cells = gib(one.needed), f"{bound.seconds:.4g}", f"{bound.network:.4g}", rate
        table.add_row(str(one.value), one.outcome, *cells)
    Console().print(table)
    best = "none that fits is known" if found.best is None else f"{question} {found.best.value}"
    print(f"{best}{'' if found.finished else ended(question, found)}")
    for one in attempts:
        if one.outcome == "does not compile":
            print(f"{question} {one.value}: {one.reason}")
    if found.best is not None:
        print(found.best.plan)
