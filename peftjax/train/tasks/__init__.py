"""The tasks of a training run by name: each prepares a run, and evaluates a saved adapter."""

from types import ModuleType

from peftjax.train.config import Task
from peftjax.train.tasks import classification, language

TASKS: dict[Task, ModuleType] = {"classification": classification, "language": language}
"""Each has `prepare(options, config, method_for, say)`, with `method_for(training examples) -> method`,
`saved_batches(info, texts, folder, batch_size)` and `named_scores(scores)`."""
