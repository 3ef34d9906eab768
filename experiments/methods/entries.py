"""The contender that a method of the registry is, as large as LoRA where one of its options sets its size."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

import peftjax as pj
from experiments.harness.contenders import Contender, Setting
from peftjax.backbone.backbone import Backbone, Params
from peftjax.core import tree
from peftjax.core.errors import PeftError

LORA = "lora"
"""What all others are compared with."""
SIZES = (
    "density", "count", "stored", "vectors", "size", "length", "rank", "block", "reduction", "side",
    "num_queries", "factor", "preserved",
)  # fmt: skip
"""The options that say how much a method trains; the first of them that a method has sets its size."""
OWN: dict[str, Mapping[str, Any]] = {
    "batch_ensemble": {"members": 1},
    "freeze": {"targets": ["embed"]},
    "mam": {"mlp_size": None},
    "my3dgen": {"targets": "all-linear"},
    "prefix": {"mlp_size": None},
    "unfreeze": {"targets": ["head"]},
    "vblora": {"length": 32},
}
"""Options that are not the defaults: one member, whose batch has no copies; all but the embedding; prefixes
without a network; linear layers, as the others have; the head alone; vectors that divide all widths."""
TOGETHER: dict[str, Callable[[Any], dict[str, Any]]] = {
    "adalora": lambda rank: {"rank": rank, "target_rank": max(1, 2 * rank // 3)},
    "mam": lambda size: {"size": size, "length": size},
}
"""Where a size is two options."""
NEEDS = {"rows": "it trains the rows of a table that are named, such as those of new tokens: no task has any"}
"""Why a method has no place here."""
DATA: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "corda": lambda setting: {"moments": setting.inputs().moments},
    "eva": lambda setting: {"covariances": setting.inputs().covariances},
    "lora_ga": lambda setting: {"gradients": setting.gradients()},
}
"""What a start from data takes; where there are no batches, the start counts as loaded."""
POWERS = 16
"""How many powers of two are tried as a size."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method on a task.

    Attributes:
        name: in the registry.
        options: what is not at its default, without arrays.
        contender: the method of a setting.
    """

    name: str
    options: dict[str, Any]
    contender: Contender

    @property
    def calibrates(self) -> bool:
        """Whether its shapes may depend on the batches it is calibrated on."""
        return self.name in DATA

    @property
    def own_classifier(self) -> bool:
        """Whether it answers with a classifier of its own, which takes the place of the model's."""
        return pj.METHODS[self.name].conformance.reads_classifier


def entry_of(name: str, rank: int, steps: int, model: Backbone, params: Params, width: int) -> Entry:
    """The contender of a method.

    Args:
        name: in the registry.
        rank: of the LoRA whose number of trained parameters is aimed at.
        steps: of a run.
        model: that is adapted.
        params: its parameters, or their shapes.
        width: of the model.

    Raises:
        PeftError: the method has no place in these experiments, or does not fit the model in any size.
    """
    if name in NEEDS:
        raise PeftError(NEEDS[name])
    options = {**_usual(name, steps, width), **OWN.get(name, {})}
    if (sized := size_option(name)) is not None and name != LORA:
        wanted = _trained(pj.lora(rank=rank), params)
        of_size = TOGETHER.get(name, lambda size: {sized: size})

        def count(size: float) -> int | None:
            try:
                method = _made(name, {**options, **of_size(size)}, rank, Setting(steps))
                method.model(model)
                return _trained(method, params)
            except PeftError:
                return None

        size = nearest(count, wanted, whole=sized != "density")
        options |= {} if size is None else of_size(size)
    elif name == LORA:
        options |= {"rank": rank}
    make = functools.partial(_made, name, options, rank)
    return Entry(name, options, Contender(name, make))


def size_option(name: str) -> str | None:
    """The option that sets how much a method trains; None of one that trains all weights, or none."""
    info, names = pj.METHODS[name], _options(name)
    if info.kind not in ("adapter", "selection") or "train_rest" in names:
        return None
    return next((option for option in SIZES if option in names), None)


def nearest(count: Callable[[Any], int | None], wanted: int, *, whole: bool) -> float | int | None:
    """The size with which a method trains nearest to a number of parameters.

    Powers of two are tried, and from the best of them steps up and down, half as long each time. Of equally
    near ones the first counts.

    Args:
        count: trained parameters of a size; None where it does not fit.
        wanted: the number.
        whole: whether sizes are whole numbers; else they are shares.

    Returns:
        The size, or None where no size fits or all train as many.
    """
    seen: dict[float, int | None] = {}

    def distance(size: float) -> float:
        if size not in seen:
            seen[size] = count(size)
        return float("inf") if seen[size] is None else abs(seen[size] - wanted)

    powers = [2**n if whole else 2.0**-n for n in range(POWERS)]
    best = min(powers, key=distance)
    if len({found for found in seen.values() if found is not None}) < 2:
        return None
    step = best / 2
    while step >= (1 if whole else best / 256):
        by = int(step) if whole else step
        tried = [best, best - by, best + by]
        best = min((size for size in tried if size > 0 and (whole or size <= 1)), key=distance)
        step /= 2
    return best


def _usual(name: str, steps: int, width: int) -> dict[str, Any]:
    """What follows from a run's steps and from the model's width, as in the pre-training experiments."""
    names, found = _options(name), {}
    if "every" in names:
        found["every"] = max(1, steps // 6)
    of_all = pj.METHODS[name].kind == "optimizer" or "train_rest" in names
    if of_all and "rank" in names:
        found["rank"] = width // 4
    return found


def _made(name: str, options: Mapping[str, Any], rank: int, setting: Setting) -> pj.Transform:
    """The method; what trains nothing goes beside a LoRA, and what takes a method takes one."""
    info, names = pj.METHODS[name], _options(name)
    given = {**(info.of_steps(setting.steps) if info.of_steps else {}), **options}
    if name in DATA:
        given |= DATA[name](setting) if setting.calibrates else {"loaded": True}
    if "method" in names:
        given["method"] = pj.lora(rank=rank)
    method = info.factory(**given)
    return pj.chain(method, pj.lora(rank=rank)) if info.kind in ("companion", "rewrite") else method


def _options(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pj.METHODS[name].factory).parameters


def _trained(method: pj.Transform, params: Params) -> int:
    _, trainable = jax.eval_shape(method.init, jax.random.key(0), params)
    return tree.count(trainable)
