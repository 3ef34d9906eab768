"""What a task hands to the run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grain

from peftjax.backbone.backbone import Backbone, Params
from peftjax.losses import Batch
from peftjax.transform.transform import Transform


@dataclass(frozen=True)
class Prepared:
    """Model, method and data of a run, and what only its task can say about them."""

    model: Backbone
    params: Params
    method: Transform
    """The method that was asked for, with plain training of what the head has new."""
    examples: int
    """Rows of an epoch."""
    training: grain.DatasetIterator
    """Endless training batches."""
    held_out: Callable[[], Iterable[Batch]]
    """The evaluation batches, anew with each call."""
    data: Mapping[str, Any]
    """The data's name and the SHA-256 of what is trained and evaluated on."""
    info: Mapping[str, Any]
    """What the adapter's folder says beside method and numbers."""
    evaluates_before: bool
    """Whether the model is evaluated before training too."""
    summary: Mapping[str, Any]
    """What the task has to report of its data, and of what it compares with."""
