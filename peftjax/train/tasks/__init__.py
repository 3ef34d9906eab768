"""The tasks of a training run by name."""

from peftjax.train.config import Task
from peftjax.train.tasks.classification import CLASSIFICATION
from peftjax.train.tasks.language import LANGUAGE
from peftjax.train.tasks.task import TaskSteps

TASKS: dict[Task, TaskSteps] = {"classification": CLASSIFICATION, "language": LANGUAGE}
