"""n:m patterns: of each m consecutive inputs of an output, n weights are kept."""

from collections.abc import Sequence

from peftjax.core.errors import PeftError
from peftjax.methods._targets import Target
from peftjax.weights.score_pruned import Pattern


def parsed(caller: str, pattern: str | None) -> Pattern | None:
    """`'2:4'` as `(2, 4)`.

    Raises:
        PeftError: it is no pattern.
    """
    if pattern is None:
        return None
    kept, _, of = pattern.partition(":")
    if not (kept.isdecimal() and of.isdecimal() and 0 < int(kept) < int(of)):
        raise PeftError(f"{caller}: pattern is 'n:m' with 0 < n < m, such as '2:4', got {pattern!r}")
    return int(kept), int(of)


def require_fits(caller: str, pattern: Pattern | None, targets: Sequence[Target]) -> None:
    """Raise a PeftError for a target whose inputs are no whole number of groups."""
    for target in targets:
        inputs = target.layout.matrix[0]
        if pattern is not None and inputs % pattern[1]:
            raise PeftError(
                f"{caller}: {target.path!r} has {inputs} inputs, which groups of {pattern[1]} do not divide; "
                "exclude it, or give another pattern"
            )
