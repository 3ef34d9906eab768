"""The contenders of a comparison: a method with its optimizer, made for a setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax

import peftjax as pj
from peftjax.backbone.backbone import Backbone, Params
from peftjax.backbone.block_config import AttentionKind
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.losses import Batch, cross_entropy
from peftjax.train.new_head import with_new_head

Statistics = Callable[[], Mapping[str, jax.Array]]
"""Computes an array for every weight, by path, before training."""


def no_statistics() -> Any:
    """Where there is no batch to calibrate on.

    Raises:
        PeftError: always.
    """
    raise PeftError("this experiment trains nothing, so that no contender can calibrate on its batches")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a contender may need to know of the run that it is made for.

    Attributes:
        steps: optimizer steps.
        rank: of factors and projections, where the experiment sets one for all.
        every: steps between projections or restarts.
        scale: of a projected step, "alpha" in GaLore's paper.
        gradients: the gradient by every linear weight.
        fisher: the Fisher information of every weight.
        inputs: the statistics of what enters every linear weight.
    """

    steps: int
    rank: int = 0
    every: int = 0
    scale: float = 1.0
    gradients: Statistics = no_statistics
    fisher: Statistics = no_statistics
    inputs: Callable[[], pj.calibrate.InputStatistics] = no_statistics

    @property
    def calibrates(self) -> bool:
        """Whether there are batches to calibrate on."""
        return self.gradients is not no_statistics


def adamw(setting: Setting, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW without weight decay."""
    return optax.adamw(rate, weight_decay=0.0)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        label: its name there.
        method: the method for a setting.
        optimizer: of a setting and a learning rate or its schedule; given to the method's hook.
        matched: whether it has to train as many parameters as the others; a reference point does not.
        remat: policy of the backbone.
        tile: tokens that its feed-forward takes at a time.
        attention: of the backbone.
        own_head: whether the method makes all that the loss reads: no classifier is trained beside it.
    """

    label: str
    method: Callable[[Setting], pj.Transform]
    optimizer: Callable[[Setting, Any], optax.GradientTransformation] = adamw
    matched: bool = True
    remat: str | None = None
    tile: int | None = None
    attention: AttentionKind = "rows"
    own_head: bool = False


def calibrated(
    steps: int, model: Backbone, params: Params, batches: Callable[[], Iterable[Batch]]
) -> Setting:
    """The setting of a run whose contenders may ask for statistics of the first batches."""

    def loss(params: Params, batch: Batch) -> jax.Array:
        return cross_entropy(model(params, batch), batch)

    return Setting(
        steps,
        gradients=lambda: pj.calibrate.mean_gradient(loss, params, batches()),
        fisher=lambda: pj.calibrate.fisher_information(loss, params, batches()),
        inputs=lambda: pj.calibrate.input_statistics(model, params, batches()),
    )


def make_method(contender: Contender, setting: Setting, model: Backbone, params: Params) -> pj.Transform:
    """The contender's method and, where that leaves it alone, plain training of the classifier."""
    method = contender.method(setting)
    return method if contender.own_head else with_new_head(method, model, params)


def adapter_size(method: pj.Transform, params: Params) -> int:
    """Trained parameters without those of the classifier, where there is one: every contender trains it."""
    _, trainable = jax.eval_shape(method.init, jax.random.key(0), params)
    return tree.count(trainable) - tree.count(params["head"].get("classifier", {}))


def require_equal(sizes: Sequence[tuple[Contender, int]], tolerance: float) -> None:
    """Check that the matched contenders train as many parameters as the first of them.

    Raises:
        PeftError: one is further away than `tolerance`, relative to the first.
    """
    matched = [(contender.label, size) for contender, size in sizes if contender.matched]
    for label, size in matched[1:]:
        first, wanted = matched[0]
        if abs(size - wanted) > tolerance * wanted:
            raise PeftError(
                f"{label} trains {size:,} parameters and {first} {wanted:,}, more than {tolerance:.0%} "
                "apart: choose another rank or density"
            )
