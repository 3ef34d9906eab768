"""`peftjax plan`: the memory and the FLOPs of a training step, from a model's config.json alone."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from peftjax.backbone.backbone import Backbone, Batch
from peftjax.backbone.block_config import AttentionKind
from peftjax.cli.report import show
from peftjax.planner.step import Plan, plan
from peftjax.train.config import Dtype, Optimizer, Task, TrainConfig, validate, with_defaults
from peftjax.train.method import make_method
from peftjax.train.new_head import with_new_head
from peftjax.train.open import LANGUAGE_HEAD, abstract_model, find_base, longest_text
from peftjax.train.optimizer import make_optimizer
from peftjax.train.options import MethodOptions, ModelOptions
from peftjax.train.paging import OptimizerMemory

STEPS = 100
"""Of the run that the step is one of: any number, the memory does not depend on it."""


@dataclass(frozen=True)
class PlanOptions:
    """What a training step needs on a device that need not be there; no weights are read."""

    base: ModelOptions = field(default_factory=ModelOptions)
    tuning: MethodOptions = field(default_factory=MethodOptions)
    target: str = "cpu"
    """The device: 'cpu', 'h100', 'h200', or a TPU topology, such as 'v5e:2x2', of which without a mesh one
    chip is meant. Each needs its compiler, not the hardware; where it is missing, the command says how to
    install it."""
    num_labels: int = 2
    """Labels of a classifier; a decoder without a head given is planned as a language model."""
    batch_size: int = 32
    """Examples per optimizer step."""
    max_length: int | None = None
    """Tokens of every text; by default those of `peftjax train`."""
    mesh: str | None = None
    """All devices of the target, by axis, such as 'fsdp=8,tensor=2'; 'all' puts them on fsdp. Sizes are then
    those of one device. By default the target is one device."""
    optimizer: Optimizer = "adamw"
    """The optax optimizer; adamw8bit and lion8bit keep their moments in eight bits."""
    optimizer_memory: OptimizerMemory = "device"
    """Where the optimizer's state lies between steps: on the device, or in the host's memory."""
    dtype: Dtype = "float32"
    """Compute dtype of the model; its parameters are in float32."""
    remat: str = "none"
    """What the backward pass recomputes: 'none', or the name of a `jax.checkpoint` policy."""
    attention: AttentionKind = "rows"
    """As of `peftjax train`."""
    json: bool = False
    """As JSON, sizes in bytes."""


def run_plan(command: PlanOptions, console: Console) -> None:
    """Print the table of `pj.plan`."""
    found = planned(command)
    values = {**dataclasses.asdict(found), "peak": found.bytes.peak}
    show(command.json, values, lambda: print(found))


def planned(options: PlanOptions) -> Plan:
    """The plan of the step that `peftjax train` would run with these options, on batches of the full length.

    Raises:
        PeftError: an option or config.json cannot be used, the target's compiler is missing, or it refuses
            the step.
    """
    base = find_base(options.base.model)
    writes = base.is_decoder and options.base.head in (None, LANGUAGE_HEAD)
    task: Task = "language" if writes else "classification"
    config = TrainConfig(
        batch_size=options.batch_size,
        max_length=options.max_length,
        optimizer=options.optimizer,
        optimizer_memory=options.optimizer_memory,
        dtype=options.dtype,
        remat=options.remat,
        attention=options.attention,
    )
    validate(config)
    config = with_defaults(config, task, longest_text(base))
    num_labels = None if writes else options.num_labels
    model, params = abstract_model(base, options.base, num_labels, dtype=options.dtype, remat=options.remat)
    model = dataclasses.replace(model, attention=options.attention)
    method = with_new_head(make_method(options.tuning, STEPS), model, params)
    batch = batch_shapes(model, config.batch_size, config.max_length, per_token=writes)
    optimizer = make_optimizer(config, STEPS)
    return plan(
        method,
        model,
        params,
        batch,
        optimizer=optimizer,
        target=options.target,
        optimizer_memory=config.optimizer_memory,
        mesh=options.mesh,
    )


def batch_shapes(model: Backbone, size: int, length: int, *, per_token: bool) -> Batch:
    """The shapes of a training batch: the model's own inputs, and labels of each token or of each example.

    Args:
        model: whose inputs.
        size: examples.
        length: tokens of each.
        per_token: whether the labels are the next tokens.
    """

    def int32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    batch = {
        name: int32(size, length)
        if jnp.issubdtype(one.dtype, jnp.integer)
        else jax.ShapeDtypeStruct((size, *one.shape[1:]), one.dtype)
        for name, one in model.example.items()
    }
    if "input_ids" in batch:
        batch["attention_mask"] = int32(size, length)
    if per_token:
        batch["position_ids"] = int32(size, length)
    labels = (size, length) if per_token else (size,)
    return {**batch, "labels": int32(*labels), "weights": jax.ShapeDtypeStruct(labels, jnp.float32)}
