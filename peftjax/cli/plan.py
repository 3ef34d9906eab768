"""`peftjax plan`: what a training step needs and takes at least, from a model's config.json or name alone."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from peftjax.backbone.backbone import Backbone, Batch
from peftjax.backbone.block_config import AttentionKind
from peftjax.cli.plan_search import Question, print_search, search_values, searched
from peftjax.cli.report import show
from peftjax.planner.compiling import DoesNotFit
from peftjax.planner.result import Plan
from peftjax.planner.step import plan
from peftjax.train.config import Dtype, Optimizer, Task, TrainConfig, require_numbers, validate, with_defaults
from peftjax.train.method import make_method
from peftjax.train.new_head import with_new_head
from peftjax.train.open import LANGUAGE_HEAD, BaseModel, abstract_model, find_config, longest_text
from peftjax.train.optimizer import make_optimizer
from peftjax.train.options import MethodOptions, ModelOptions
from peftjax.train.paging import OptimizerMemory

STEPS = 100
"""Of the run that the step is one of: any number, the memory does not depend on it."""


@dataclass(frozen=True)
class PlanOptions:
    """What a training step needs on a device that need not be there; no weights are read.

    The model may also be a config.json, or a name: llama-3-8b, llama-3-70b, qwen3-32b, bert-large, vit-h ...
    """

    base: ModelOptions = field(default_factory=ModelOptions)
    tuning: MethodOptions = field(default_factory=MethodOptions)
    target: Annotated[str, tyro.conf.arg(aliases=("--topology",))] = "cpu"
    """The device: 'cpu', 'h100', 'h200', several of a host such as 'h200:8', or a TPU topology such as
    'v5e:2x2', of which without a mesh one device is meant. Each needs its compiler, not the hardware; where
    it is missing, the command says how to install it."""
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
    """Compute dtype of the model."""
    param_dtype: Dtype = "float32"
    """Dtype of the model's parameters; `peftjax train` has float32."""
    remat: str = "none"
    """What the backward pass recomputes: 'none', or the name of a `jax.checkpoint` policy."""
    attention: AttentionKind = "rows"
    """As of `peftjax train`."""
    search: Question | None = None
    """Look for the largest batch or the longest row that fits, or for the mesh or remat policy that takes
    least time of those that fit, with a compilation for each try."""
    time_limit: float | None = None
    """Minutes after which a search begins no further compilation; it then says what is known."""
    json: bool = False
    """As JSON, sizes in bytes."""


def run_plan(command: PlanOptions, console: Console) -> None:
    """Print the table of `pj.plan`, or what a search found."""
    require_numbers(dataclasses.asdict(command))
    if command.search is not None:
        base = find_config(command.base.model)
        found = searched(command, planned, longest_row(base), heads_of(base), console)
        show(command.json, search_values(found), lambda: print_search(command.search, found))
        return
    try:
        plan = planned(command)
    except DoesNotFit as error:
        values = {"fits": False, "needed": error.needed, "capacity": error.capacity, "reason": str(error)}
        show(command.json, values, lambda: print(f"does not fit: {values['reason']}"))
    else:
        show(command.json, plan_values(plan), lambda: print(plan))


def plan_values(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    values = {"peak": plan.bytes.peak, "fits": plan.fits, "most_per_second": plan.most_per_second}
    bound = plan.roofline
    least = {} if bound is None else {"seconds": bound.seconds, "limit": bound.limit}
    return {**dataclasses.asdict(plan), **values, **least}


def heads_of(base: BaseModel) -> int:
    """The heads of a model's attention."""
    names = ("num_attention_heads", "num_heads", "n_head")
    return next((base.config[name] for name in names if name in base.config), 1)


def longest_row(base: BaseModel) -> int | None:
    """The tokens of the longest row that a model can read; None of one that reads none."""
    return longest_text(base) or base.config.get("max_position_embeddings")


def planned(options: PlanOptions) -> Plan:
    """The plan of the step that `peftjax train` would run with these options, on batches of the full length.

    Raises:
        PeftError: an option or config.json cannot be used, the target's compiler is missing, or it refuses
            the step.
    """
    base = find_config(options.base.model)
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
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, options.param_dtype), params)
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
