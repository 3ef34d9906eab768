"""The memory that training steps need, by the compiler, for models and contenders; nothing is run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import peftjax as pj
from experiments.harness.contenders import Contender, Setting, make_method
from experiments.harness.record import commit, provenance, write_json
from experiments.harness.report import NAME, Report, read_results, write_report
from peftjax.backbone.backbone import Backbone, Params
from peftjax.core.errors import PeftError
from peftjax.planner.compiling import DoesNotFit
from peftjax.planner.residuals import nbytes

Found = dict[str, Any]
Plans = dict[str, dict[str, Found]]
"""A plan, or the reason why there is none, by model and contender."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and the batch of a step, from shapes alone.

    Attributes:
        name: in the tables.
        build: `(number of layers, or None for the model's own, dtype) -> backbone`.
        batch: rows of a step.
        length: tokens of a row; None for images.
        dtype: of parameters, optimizer state and computation.
        layers: where it is not the model's own number.
        target: the machine, where it is not that of the table.
        mesh: its devices by axis; None is one device.
    """

    name: str
    build: Callable[[int | None, str], Backbone]
    batch: int
    length: int | None
    dtype: str
    layers: int | None = None
    target: str | None = None
    mesh: str | None = None

    def backbone(self, remat: str | None = None, tile: int | None = None) -> Backbone:
        """The model under a policy."""
        return dataclasses.replace(self.build(self.layers, self.dtype), remat=remat, feed_forward_tile=tile)

    def params(self, model: Backbone) -> Params:
        """The shapes of its parameters."""
        shapes = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(self.dtype)), shapes)

    def inputs(self, model: Backbone) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch; a language model predicts every token, other models a class."""
        if self.length is None:
            image = (self.batch, model.config.num_channels, *model.config.image_size)
            inputs = {"pixel_values": jax.ShapeDtypeStruct(image, jnp.dtype(self.dtype))}
        else:
            tokens = jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32)
            inputs = {"input_ids": tokens}
        labels = (self.batch, self.length) if model.head_name == "causal_lm" else (self.batch,)
        return {**inputs, "labels": jax.ShapeDtypeStruct(labels, jnp.int32)}


def memory_report(
    text: Callable[[Plans], str],
    draw: Callable[[Plans, Path], None],
    answer: Callable[[Plans], dict[str, str]],
) -> Report:
    """A report of the plans alone."""
    return Report(
        lambda results: text(results["plans"]),
        lambda results, file: draw(results["plans"], file),
        lambda results: answer(results["plans"]),
        levels=3,
    )


def peaks(plans: Plans, model: str, chosen: tuple[str, ...]) -> dict[str, str]:
    """The peak of a step of some contenders on a model."""
    rows = plans.get(model, {})
    return {
        label: f"{rows[label]['peak'] / 2**30:.2f} GiB on {model}"
        for label in chosen
        if "peak" in rows.get(label, {})
    }


def _no_setting(model: Model) -> Setting:
    return Setting(steps=10_000)


@dataclasses.dataclass(frozen=True)
class Table:
    """Which contenders on which models.

    Attributes:
        models: in the order of the report.
        contenders: likewise.
        report: how the plans are told.
        setting: of a model.
        asked: whether a contender is measured on a model.
    """

    models: tuple[Model, ...]
    contenders: tuple[Contender, ...]
    report: Report
    setting: Callable[[Model], Setting] = _no_setting
    asked: Callable[[Model, Contender], bool] = lambda model, contender: True


def measure(model: Model, contender: Contender, setting: Setting, target: str, rate: float = 1e-3) -> Found:
    """What one step needs, as JSON values; of a method that a model does not have, the reason.

    `model` are the bytes of the parameters, `beside` those of all else that stays between steps, and
    `working` is the peak less what stays.
    """
    backbone = model.backbone(contender.remat, contender.tile)
    backbone = dataclasses.replace(backbone, attention=contender.attention)
    params = model.params(backbone)
    try:
        plan = pj.plan(
            make_method(contender, setting, backbone, params),
            backbone,
            params,
            model.inputs(backbone),
            optimizer=contender.optimizer(setting, rate),
            target=model.target or target,
            mesh=model.mesh,
        )
    except DoesNotFit as error:
        return {"reason": str(error), "fits": False, "needed": error.needed, "capacity": error.capacity}
    except PeftError as error:
        return {"reason": str(error)}
    found = dataclasses.asdict(plan)
    persistent = sum(found["bytes"][kind] for kind in ("weights", "method_state", "trainable", "optimizer"))
    weights = nbytes(jax.tree.leaves(params))
    return {
        **found,
        "peak": plan.bytes.peak,
        "fits": plan.fits,
        "model": weights,
        "beside": persistent - weights,
        "working": plan.bytes.peak - persistent,
        "batch": model.batch,
        "jax": jax.__version__,
        "commit": commit(),
    }


def fill(
    table: Table,
    folder: Path,
    target: str,
    *,
    models: tuple[str, ...] = (),
    contenders: tuple[str, ...] = (),
    missing: bool = False,
) -> str:
    """Measure, and write what is measured after every contender; return the report.

    Args:
        table: what is asked.
        folder: where results.json, results.md and results.png go; what an earlier run left there and this one
            does not measure stays.
        target: the machine.
        models: names of the models to measure; all where none is given.
        contenders: labels, likewise.
        missing: whether to measure only what is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{NAME}.json"
    plans: Plans = read_results(folder)["plans"] if file.exists() else {}
    results = {**provenance("jax"), "plans": plans}
    for model, contender in itertools.product(table.models, table.contenders):
        name, label = model.name, contender.label
        chosen = (not models or name in models) and (not contenders or label in contenders)
        known = missing and label in plans.get(name, {})
        if chosen and not known and table.asked(model, contender):
            found = measure(model, contender, table.setting(model), target)
            plans.setdefault(name, {})[label] = found
            write_json(file, results, table.report.levels)
            print(f"{name}, {label}: {_said(found)}", flush=True)
    return write_report(folder, table.report, results)


def _said(found: Found) -> str:
    """The peak of a step and those of what is done between steps, or why there is none."""
    if "peak" not in found:
        return found["reason"]
    return ", ".join(f"{peak / 2**20:,.0f} MiB" for peak in (found["peak"], *(found["between"] or ())))
