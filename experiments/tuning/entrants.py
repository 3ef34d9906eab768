"""Who takes part in a comparison: methods, and how to make them for a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

import peftjax as pj
from peftjax.backbone.backbone import Backbone, Params
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.losses import Batch, cross_entropy
from peftjax.train.new_head import with_new_head

HEAD = ["head/classifier"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method may need to know of the run that it is made for.

    Attributes:
        steps: optimizer steps.
        gradients: computes the gradient by every linear weight, by path, before training.
        fisher: computes the Fisher information of every weight, by path, before training.
    """

    steps: int
    gradients: Callable[[], Mapping[str, jax.Array]]
    fisher: Callable[[], Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One line of the table.

    Attributes:
        label: its name there.
        make: the method for a run.
        matched: whether it has to train as many parameters as the others; a reference point does not.
    """

    label: str
    make: Callable[[Setting], pj.Transform]
    matched: bool = True


def references() -> tuple[Entrant, ...]:
    """What any method is compared with, whatever it trains: all, the biases, nothing but the head."""
    return (
        Entrant("full", lambda setting: pj.full(), matched=False),
        Entrant("bitfit", lambda setting: pj.bitfit(), matched=False),
        Entrant("head only", lambda setting: pj.unfreeze(HEAD), matched=False),
    )


def method_for(
    entrant: Entrant, model: Backbone, params: Params, steps: int, calibration: Iterable[Batch]
) -> pj.Transform:
    """The entrant's method and, where that leaves it alone, plain training of the classifier.

    Args:
        entrant: whose.
        model: what is adapted.
        params: its parameters.
        steps: optimizer steps of the run.
        calibration: training batches for the gradients, where the entrant asks for them.
    """

    def loss(params: Params, batch: Batch) -> jax.Array:
        return cross_entropy(model(params, batch), batch)

    setting = Setting(
        steps,
        lambda: pj.calibrate.mean_gradient(loss, params, calibration),
        lambda: pj.calibrate.fisher_information(loss, params, calibration),
    )
    return with_new_head(entrant.make(setting), model, params)


def adapter_size(method: pj.Transform, params: Params) -> int:
    """Trained parameters without the classifier's, which every entrant trains.

    Slots that the method's optimizer sets, such as a share of pruned entries, are not trained.
    """
    _, trainable = jax.eval_shape(method.init, jax.random.key(0), params)
    moves = jax.tree.leaves(method.moving(trainable))
    trained = [leaf for leaf, moves in zip(jax.tree.leaves(trainable), moves) if moves]
    return tree.count(trained) - tree.count(params["head"]["classifier"])


def require_equal(sizes: Sequence[tuple[Entrant, int]], tolerance: float) -> None:
    """Check that the matched entrants train as many parameters as the first of them.

    Raises:
        PeftError: one is further away than `tolerance`, relative to the first.
    """
    matched = [(entrant.label, size) for entrant, size in sizes if entrant.matched]
    for label, size in matched[1:]:
        first, wanted = matched[0]
        if abs(size - wanted) > tolerance * wanted:
            raise PeftError(
                f"{label} trains {size:,} parameters and {first} {wanted:,}, more than {tolerance:.0%} "
                "apart: choose another rank or density"
            )
