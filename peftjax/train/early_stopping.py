"""The best evaluation of a run so far, and when to stop waiting for a better one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int | None = None
    score: float | None = None
    """Higher is better."""
    waited: int = 0
    """Evaluations since then."""


def update(best: Best, step: int, score: float) -> Best:
    """The best after one more evaluation; of equal scores the first stays."""
    if best.score is None or score > best.score:
        return Best(step, score)
    return Best(best.step, best.score, best.waited + 1)


def is_over(best: Best, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row were not better; never without a patience."""
    return patience is not None and best.waited >= patience
