"""A whole fine-tuning run: what it is, training, and what it leaves."""

import time
from collections.abc import Callable
from dataclasses import replace

from peftjax.parallel.lost import names_lost
from peftjax.parallel.processes import gathered, is_first
from peftjax.train.fine_tune import fine_tune
from peftjax.train.options import RunOptions
from peftjax.train.resolve import resolve
from peftjax.train.write import Summary, write


def run(options: RunOptions, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Fine-tune, and leave the adapter and a summary in the output folder.

    Args:
        options: what to train on what.
        say: called with a line about each stage.

    Returns:
        The contents of `summary.json`: the scores on the evaluation texts, counts of parameters, peak
        bytes of the process, real tokens (no padding) and counted labels per second of training; for
        classification the accuracies of the linear probe and of the majority class, for language the
        scores before training, and how many tokens were counted, filled up and cut. Of several processes the
        first one has it, and writes.

    Raises:
        PeftError: an option, a file or the data cannot be used; earlier outputs stay as they were.
        LostProcess: another process of the run is gone.
        Preempted: as `fit`.
    """
    started = time.perf_counter()
    with names_lost():
        resolved = resolve(options, say)
        result = fine_tune(resolved, say)
        fitted = result.fitted
        frozen = replace(fitted.frozen, state=gathered(fitted.frozen.state))
        fitted = replace(fitted, frozen=frozen, trainable=gathered(fitted.trainable))
    if not is_first():
        return {}
    return write(resolved, replace(result, fitted=fitted), started=started)
