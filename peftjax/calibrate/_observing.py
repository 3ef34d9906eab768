"""Sums over what passes through weights, from one backward pass a batch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, select
from peftjax.weights.layout import Layout, layout_of
from peftjax.weights.observed import Observed

Sums = dict[str, dict[str, dict[str, Array]]]
"""The sums of each observer by its name, of each weight by its path."""
Observe = Callable[[Any, Layout, Array | None], Mapping[str, Observed]]
"""`(weight, layout, mask) -> observers`, each around the one before it, the first around the weight."""


def observed_sums(
    caller: str,
    value: Callable[[Any, Any], Array],
    params: Any,
    batches: Iterable[Any],
    observe: Observe,
    *,
    targets: Targets,
    exclude: Targets | None,
    mask: Callable[[Any], Array] | None,
) -> Sums:
    """What the observers of the targeted weights add up over all batches.

    Args:
        caller: the function that asks, for the errors.
        value: `(params, batch) -> scalar`, which takes structured weights, and whose gradients are observed.
        params: the parameters.
        batches: a calibration set.
        observe: gives the observers of a weight.
        targets: as in `lora`; linear layers alone.
        exclude: as in `lora`.
        mask: which rows of a batch count.

    Raises:
        PeftError: nothing is matched, a target is used otherwise than as a linear layer, the mask has another
            shape, or there is no batch.
    """
    leaves = tree.named_leaves(params)
    paths = select(params, targets, caller=caller, exclude=exclude)
    layouts = {path: layout_of(path, leaves, None, one_way=True) for path in paths}

    @jax.jit
    def sums(params: Any, batch: Any) -> Sums:
        leaves, rows = tree.named_leaves(params), None if mask is None else mask(batch)
        observers = {path: observe(leaves[path], layout, rows) for path, layout in layouts.items()}
        zeros = {
            path: {name: {k: v for k, v in one.slots.items() if k != "mask"} for name, one in own.items()}
            for path, own in observers.items()
        }

        def of(slots: Sums) -> Array:
            given = {}
            for path, own in slots.items():
                weight = leaves[path]
                for name, values in own.items():
                    one = observers[path][name]
                    weight = replace(one, base=weight, slots={**one.slots, **values})
                given[path] = weight
            return value(tree.replace(params, given), batch)

        return jax.grad(of)(zeros)

    add = jax.jit(lambda total, more: jax.tree.map(jnp.add, total, more))
    total = None
    for batch in batches:
        more = sums(params, batch)
        total = more if total is None else add(total, more)
    if total is None:
        raise PeftError(f"{caller}: there is no batch; give at least one")
    return total
