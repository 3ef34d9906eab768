"""How often a traced program has to read each of its inputs from memory, at least.

An input counts once for every loop that goes over it (a stack of layers in the forward pass, and again in
the backward pass), and once for all that is done with it outside of loops, which a compiler may fuse. Looking
rows up reads some of them only, and counts nothing; neither does what no output needs.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from peftjax.core import compat
from peftjax.planner.flops import inner_jaxprs, of_equation

LOOPS = ("scan", "while")
LOOKUPS = ("gather", "dynamic_slice")


def count_reads(jaxpr: Any, platform: str = "cpu") -> list[int]:
    """The reads of each input of a jaxpr, open or closed, lowered for `platform`."""
    inner = compat.open_jaxpr(jaxpr)[0]
    found = _count(inner, [True] * len(inner.outvars), platform)
    return [loops + outside for loops, outside in found]


def _count(jaxpr: Any, used: Sequence[bool], platform: str) -> list[tuple[int, bool]]:
    """Of each input how many loops read it, and whether something else does."""
    live = {variable for variable, use in zip(jaxpr.outvars, used) if use and not compat.is_literal(variable)}
    loops: Counter[Any] = Counter()
    outside: set[Any] = set()
    for eqn in reversed(jaxpr.eqns):
        of_outputs = [variable in live for variable in eqn.outvars]
        if not (any(of_outputs) or eqn.effects):
            continue
        needed = of_equation(eqn, of_outputs, platform)[1]
        live |= {v for v, need in zip(eqn.invars, needed) if need and not compat.is_literal(v)}
        for variable, need, (in_loops, elsewhere) in zip(
            eqn.invars, needed, _of_inputs(eqn, of_outputs, platform)
        ):
            if need and not compat.is_literal(variable):
                loops[variable] += in_loops
                outside |= {variable} if elsewhere else set()
    return [(loops[variable], variable in outside) for variable in jaxpr.invars]


def _of_inputs(eqn: Any, used: list[bool], platform: str) -> list[tuple[int, bool]]:
    """The same of the inputs of an equation."""
    inner = [compat.open_jaxpr(one)[0] for one in inner_jaxprs(eqn.params)]
    alone = len(inner) == 1 and len(inner[0].invars) == len(eqn.invars)
    if eqn.primitive.name == "scan" and alone:
        read = _count(inner[0], [True] * len(inner[0].outvars), platform)
        return [(int(loops + outside > 0), False) for loops, outside in read]
    if eqn.primitive.name in LOOPS:
        return [(1, False)] * len(eqn.invars)
    if alone:
        return _count(inner[0], used, platform)
    first = eqn.primitive.name not in LOOKUPS
    return [(0, place > 0 or first) for place in range(len(eqn.invars))]
