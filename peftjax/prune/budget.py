"""How much of a model may stay for a target: parameters, FLOPs, or the bytes of a compiled step."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.prune.group import Groups
from peftjax.prune.selection import number_kept
from peftjax.prune.slicing import cut, take

Cost = Callable[[Any, Any], float]
"""`(model, shapes of its parameters) -> number`, which is less for a smaller model."""


def parameters(model: Any, params: Any) -> int:
    """How many numbers the parameters have: a `Cost`."""
    return tree.count(params)


def largest_share(
    model: Callable[..., Any], params: Any, groups: Groups, limit: float, cost: Cost = parameters
) -> float:
    """The largest share that every group may keep for a sliced model that costs no more than a limit.

    It is found by bisection; only shapes are cut. `cost` is asked about log2 of the number of different
    sizes; with `pj.plan` it is FLOPs or the bytes of the compiled step:

        lambda model, params: pj.plan(method, model, params, batch, optimizer=tx).flops      # or .needed

    Args:
        model: as of `groups_of`.
        params: its parameters, or their shapes.
        groups: those that are cut.
        limit: what `cost` may be.
        cost: of the sliced model, by default its number of parameters.

    Returns:
        The share for `select`.

    Raises:
        PeftError: a model that keeps one unit of each group costs more.
    """
    shapes = jax.eval_shape(lambda given: given, params)
    shares = sorted(
        {Fraction(kept, group.count) for group in groups.values() for kept in range(1, group.count + 1)}
    )
    low, high = -1, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        if _cost_of(model, shapes, groups, float(shares[middle]), cost) <= limit:
            low = middle
        else:
            high = middle
    if low < 0:
        least = _cost_of(model, shapes, groups, float(shares[0]), cost)
        raise PeftError(
            f"largest_share: the smallest model costs {least:,}, more than {limit:,}; raise the limit"
        )
    return float(shares[low])


def _cost_of(model: Callable[..., Any], shapes: Any, groups: Groups, share: float, cost: Cost) -> float:
    kept = {
        name: np.broadcast_to(np.arange(group.count) < number_kept(share, group.count), group.shape)
        for name, group in groups.items()
    }
    small, recipe = cut(model, shapes, groups, kept)
    return cost(small, jax.eval_shape(lambda given: take(given, recipe), shapes))
