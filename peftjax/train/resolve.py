"""The first step of a run: everything decided, each file of options, configuration and data opened here."""

from collections.abc import Callable

from peftjax.train.config import plan_steps, validate, with_defaults
from peftjax.train.data.files import data_file
from peftjax.train.method import make_method, needs_steps
from peftjax.train.open import find_base, longest_text
from peftjax.train.options import RunOptions
from peftjax.train.tasks import TASKS
from peftjax.train.tasks.find import find_task
from peftjax.train.tasks.task import Run


def resolve(options: RunOptions, say: Callable[[str], None] = lambda text: None) -> Run:
    """Decide what a run is: its model's folder, task, data, steps and method.

    Args:
        options: what to train on what.
        say: called with a line about the data.

    Raises:
        PeftError: an option, the model's configuration, its tokenizer or the data cannot be used.
    """
    validate(options.training)
    # Where nothing of it follows from the data, a mistake is found before the data is read.
    early = None if needs_steps(options.tuning) else make_method(options.tuning)
    base = find_base(options.base.model)
    file = data_file(options.texts.data)
    task = find_task(options, base, file)
    config = with_defaults(options.training, task, longest_text(base))
    data = TASKS[task].read(options, base, config, file, say)
    steps = plan_steps(config, len(data.train))
    method = early or make_method(options.tuning, steps.total)
    return Run(options, base, task, config, data, steps, method)
