"""Evaluation of a model with an adapter, over batches."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import jax
from jax.sharding import Mesh

from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.losses import Batch, Objective
from peftjax.parallel.placement import shard_batch
from peftjax.train.gradient import Sums
from peftjax.train.step import Forward
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.transform import Transform

Evaluate = Callable[[Trainable, Frozen, Iterable[Batch]], dict[str, float]]
"""`(trainable, frozen, batches) -> means over all examples`."""


def make_evaluate(
    forward: Forward, method: Transform, objective: Objective, mesh: Mesh | None = None
) -> Evaluate:
    """Evaluation without dropout: the objective's means, every example counted once by weight.

    On a mesh each device evaluates its rows of a batch, where the mesh divides them, and the sums are of all.
    The function raises a PeftError when no example counts.
    """

    @jax.jit
    def sums_of(trainable: Trainable, frozen: Frozen, batch: Batch) -> Sums:
        return objective(adapt(forward)(method.apply(frozen, trainable), batch), batch)

    def evaluate(trainable: Trainable, frozen: Frozen, batches: Iterable[Batch]) -> dict[str, float]:
        frozen = replace(frozen, advanced=True)  # a method that has not begun may be evaluated
        totals, weights = {}, 0.0
        for batch in batches:
            placed = batch if mesh is None else shard_batch(batch, mesh)
            sums, weight = jax.device_get(sums_of(trainable, frozen, placed))
            weights += float(weight)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        if not weights > 0:
            raise PeftError(
                "no example of the evaluation counts: there is no batch, or every weight in them is 0"
            )
        return {name: total / weights for name, total in totals.items()}

    return evaluate
