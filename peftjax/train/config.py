"""The options of a training run."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from peftjax.backbone.block_config import AttentionKind
from peftjax.core.errors import PeftError
from peftjax.parallel.mesh import read_mesh
from peftjax.train.paging import OptimizerMemory

Optimizer = Literal["adamw", "adam", "sgd", "lion", "adafactor", "adamw8bit", "lion8bit"]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16"]
Metric = Literal["accuracy", "loss"]
Task = Literal["classification", "language"]

DEFAULTS: Mapping[Task, Mapping[str, Any]] = {
    "classification": {"max_length": 64, "learning_rate": 2e-3, "best_by": "accuracy"},
    "language": {"max_length": 512, "learning_rate": 2e-4, "best_by": "loss"},
}
"""The options whose default the task decides."""


@dataclass(frozen=True)
class TrainConfig:
    """What a training run does; `validate` checks it, `with_defaults` fills in what the task decides."""

    steps: int | None = None
    """Optimizer steps; by default as many as `epochs` needs."""
    epochs: float = 1.0
    """Passes over the training data, where `steps` is not given."""
    batch_size: int = 32
    """Examples per optimizer step."""
    grad_accumulation: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    max_length: int | None = None
    """Longest text in tokens; longer ones are cut. By default 64 for classification, and for a language
    model 512, or what the model was made for if that is less."""
    learning_rate: float | None = None
    """Peak learning rate; by default 2e-3 for classification, 2e-4 for a language model."""
    schedule: Schedule = "linear"
    """How the learning rate goes on after the warm-up: stays, or falls to zero at the end."""
    warmup_ratio: float = 0.06
    """Part of all steps in which the learning rate rises to its peak."""
    optimizer: Optimizer = "adamw"
    """The optax optimizer; adamw8bit and lion8bit keep their moments in eight bits."""
    optimizer_memory: OptimizerMemory = "device"
    """Where the optimizer's state lies between steps: on the device, or in the host's memory."""
    weight_decay: float = 0.0
    """Decoupled weight decay of everything trainable; adamw, lion and their 8-bit forms have it."""
    clip_norm: float | None = 1.0
    """Largest global norm of a gradient; None does not clip."""
    dtype: Dtype = "float32"
    """Compute dtype of the model; trainable parameters and their optimizer stay in float32."""
    remat: str = "none"
    """What the backward pass recomputes: 'none', or the name of a `jax.checkpoint` policy."""
    attention: AttentionKind = "rows"
    """Attention in blocks of query rows, or 'flash', the kernel of a TPU or an NVIDIA GPU where it fits."""
    mesh: str | None = None
    """The devices by axis, such as 'fsdp=4,tensor=2'; 'all' puts them all on fsdp. By default one device."""
    model_dropout: bool = False
    """Also use the pre-trained model's own dropout rates, as a Hugging Face trainer does."""
    seed: int = 0
    """Seed of the initial values, the order of the data and dropout."""
    eval_every: int | None = None
    """Steps between evaluations; by default an epoch."""
    eval_batch_size: int = 64
    """Examples per evaluation batch."""
    best_by: Metric | None = None
    """Which result of the evaluation decides what the best checkpoint is; by default the accuracy for
    classification, the loss for a language model."""
    early_stopping_patience: int | None = None
    """Evaluations without a better result after which the run stops; by default never."""
    log_every: int = 10
    """Steps between lines of the metrics file."""
    save_every: int | None = 50
    """Steps between checkpoints, besides one at each evaluation; None saves only at those."""
    keep_last: int = 1
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Best checkpoints to keep; if any, the run ends with the best parameters, not the last."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard."""


@dataclass(frozen=True)
class Steps:
    """When things happen in a run, counted in optimizer steps done."""

    total: int
    log: int
    evaluate: int
    save: int | None

    def logs(self, step: int) -> bool:
        """Whether a line of metrics is due."""
        return step % self.log == 0 or step == self.total

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due."""
        return step % self.evaluate == 0 or step == self.total

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due even without an evaluation."""
        return (self.save is not None and step % self.save == 0) or step == self.total


def with_defaults(config: TrainConfig, task: Task, longest: int | None = None) -> TrainConfig:
    """The options with the task's value for each that is not given.

    Args:
        config: the options; `validate` has passed.
        task: decides on the defaults.
        longest: tokens that the model was made for, where it has a limit.

    Raises:
        PeftError: `max_length` is given and more than `longest`.
    """
    if longest is not None and (config.max_length or 0) > longest:
        raise PeftError(
            f"max_length is {config.max_length}, but the model was made for at most {longest} tokens: "
            "choose at most that"
        )
    defaults = {name: value for name, value in DEFAULTS[task].items() if getattr(config, name) is None}
    if "max_length" in defaults and longest is not None:
        defaults["max_length"] = min(defaults["max_length"], longest)
    return dataclasses.replace(config, **defaults)


def plan_steps(config: TrainConfig, examples: int) -> Steps:
    """The steps of a run over `examples` training examples.

    Raises:
        PeftError: the epochs have more steps than can be counted.
    """
    per_epoch = examples / config.batch_size
    total = config.steps or math.ceil(min(config.epochs * per_epoch, float(_LARGEST["steps"] + 1)))
    if total > _LARGEST["steps"]:
        raise PeftError(f"{config.epochs:g} epochs are more than {_LARGEST['steps']} steps: choose fewer")
    return Steps(
        total=total,
        log=config.log_every,
        evaluate=config.eval_every or math.ceil(per_epoch),
        save=config.save_every,
    )


_AT_LEAST_ONE = (
    "steps",
    "batch_size",
    "grad_accumulation",
    "max_length",
    "eval_every",
    "eval_batch_size",
    "early_stopping_patience",
    "log_every",
    "save_every",
    "keep_last",
    "max_new_tokens",
    "top_k",
)
_POSITIVE = ("epochs", "learning_rate", "clip_norm", "time_limit")
_NOT_NEGATIVE = ("weight_decay", "keep_best", "seed", "temperature")
# What counts steps and rows in 32 bits has to hold them; a seed is a number of 64 bits.
# A cache is made for as many tokens as are asked for.
_LARGEST = {
    **dict.fromkeys(_AT_LEAST_ONE, 2**31 - 1),
    "keep_best": 2**31 - 1,
    "seed": 2**63 - 1,
    "max_new_tokens": 1_000_000,
}
_CHOICES = {
    "optimizer": get_args(Optimizer),
    "optimizer_memory": get_args(OptimizerMemory),
    "schedule": get_args(Schedule),
    "dtype": get_args(Dtype),
    "attention": get_args(AttentionKind),
    "best_by": get_args(Metric),
}


def validate(config: TrainConfig) -> None:
    """Check every option.

    Raises:
        PeftError: names the first option that cannot be, and what it can be.
    """
    values = dataclasses.asdict(config)
    for name, choices in _CHOICES.items():
        if values[name] is not None and values[name] not in choices:
            near = difflib.get_close_matches(str(values[name]), choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise PeftError(f"{name} is '{values[name]}', but has to be one of {', '.join(choices)}{hint}")
    require_numbers(values)
    if config.mesh not in (None, "all"):
        read_mesh(config.mesh)
    if config.batch_size % config.grad_accumulation:
        raise PeftError(
            f"batch_size {config.batch_size} cannot be computed in grad_accumulation "
            f"{config.grad_accumulation} equal parts: choose a divisor of the batch size"
        )
    if config.weight_decay and config.optimizer.removesuffix("8bit") not in ("adamw", "lion"):
        raise PeftError(
            f"the optimizer {config.optimizer} has no weight_decay ({config.weight_decay} given): "
            "choose adamw or lion, or 0"
        )


def require_numbers(values: Mapping[str, Any]) -> None:
    """Check the numbers among the options of a command, which mean the same in all; None is not given.

    Raises:
        PeftError: names the first that cannot be, and what it can be.
    """
    for names, allowed, rule in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (_POSITIVE, lambda value: 0 < value < math.inf, "a positive number"),
        (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "at least 0"),
        (("warmup_ratio",), lambda value: 0 <= value <= 1, "from 0 to 1"),
        (("top_p",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ):
        for name in names:
            if values.get(name) is not None and not allowed(values[name]):
                raise PeftError(f"{name} is {values[name]}, but has to be {rule}")
    for name, largest in _LARGEST.items():
        if values.get(name) is not None and values[name] > largest:
            raise PeftError(f"{name} is {values[name]:.6g}, but has to be at most {largest}")
