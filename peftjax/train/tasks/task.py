"""What is decided before a run starts, and what its task does in it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grain

from peftjax.backbone.backbone import Backbone, Params
from peftjax.losses import Batch
from peftjax.train.adapter_info import Info
from peftjax.train.config import Steps, Task, TrainConfig
from peftjax.train.data.batches import TokenizedSplit
from peftjax.train.data.files import DataFile
from peftjax.train.data.language.rows import TokenRows
from peftjax.train.open import BaseModel
from peftjax.train.options import DataOptions, RunOptions
from peftjax.transform.transform import Transform

Say = Callable[[str], None]
"""Is given a line about each stage of a run."""
Tokens = TokenizedSplit | TokenRows


@dataclass(frozen=True)
class TaskData:
    """The data of a run as tokens, and what only its task can say about them."""

    train: Tokens
    evaluation: Tokens
    training: grain.DatasetIterator
    """Endless training batches."""
    held_out: Callable[[], Iterable[Batch]]
    """The evaluation batches, anew with each call."""
    num_labels: int | None
    """Columns of the classifier; None for a decoder's own output layer."""
    identity: Mapping[str, Any]
    """The data's name and the SHA-256 of what is trained and evaluated on."""
    info: Mapping[str, Any]
    """What the adapter's folder says beside method and numbers."""
    summary: Mapping[str, Any]
    """What the task has to report of its data."""


@dataclass(frozen=True)
class Run:
    """A run with everything decided, before the model's weights are read."""

    options: RunOptions
    base: BaseModel
    task: Task
    config: TrainConfig
    data: TaskData
    steps: Steps
    method: Transform
    """The method that was asked for, without the training of a new head."""


@dataclass(frozen=True)
class TaskSteps:
    """What a task does at each step of a run, and with a saved adapter.

    Attributes:
        read: the data as tokens, of the options, the model, the options of the training with what the task
            decides, and the file of the data.
        start: the parameters to start from and what to report of how they were found, of the run, the model,
            the parameters as loaded and the method on them.
        saved_batches: the batches to evaluate a saved adapter on, and what to report of them, of what is
            noted beside the adapter, the texts, its base model and the batch size.
        named_scores: the scores as they are reported.
        evaluates_before: whether the model is evaluated before training too.
    """

    read: Callable[[RunOptions, BaseModel, TrainConfig, DataFile, Say], TaskData]
    start: Callable[[Run, Backbone, Params, Transform, Say], tuple[Params, Mapping[str, Any]]]
    saved_batches: Callable[[Info, DataOptions, BaseModel, int], tuple[Iterable[Batch], dict[str, Any]]]
    named_scores: Callable[[Mapping[str, float]], dict[str, float]]
    evaluates_before: bool
