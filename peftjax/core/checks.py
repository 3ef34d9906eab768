"""Checks of options, in one voice: `{caller}: {name} must be ..., got {value}`.

None, an option that was not given, passes all but `one_of`, and so does a number that is being traced.
"""

from collections.abc import Collection
from typing import Any

import jax

from peftjax.core.errors import PeftError


def positive(caller: str, name: str, value: Any, *, path: str | None = None) -> None:
    """Raise a PeftError unless the number is above 0; `path` is the parameter that it is for."""
    if _known(value) and not value > 0:
        raise _refused(caller, name, "positive", value, path)


def at_least(caller: str, name: str, value: Any, least: float) -> None:
    """Raise a PeftError unless the number is that much or more."""
    if _known(value) and not value >= least:
        raise _refused(caller, name, f"{least} or more", value)


def fraction(caller: str, name: str, value: Any) -> None:
    """Raise a PeftError unless the number is 0 or more and less than 1, as a rate of dropout or a decay."""
    if _known(value) and not 0.0 <= value < 1.0:
        raise _refused(caller, name, "in [0, 1)", value)


def positive_share(caller: str, name: str, value: Any) -> None:
    """Raise a PeftError unless the number is more than 0 and at most 1: a part of a whole, not empty."""
    if _known(value) and not 0.0 < value <= 1.0:
        raise _refused(caller, name, "in (0, 1]", value)


def one_of(caller: str, name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise a PeftError unless the value is one of the choices."""
    if value not in choices:
        raise _refused(caller, name, f"one of {', '.join(map(str, choices))}", value)


def _known(value: Any) -> bool:
    return value is not None and not isinstance(value, jax.core.Tracer)


def _refused(caller: str, name: str, wanted: str, value: Any, path: str | None = None) -> PeftError:
    at = "" if path is None else f" for {path!r}"
    return PeftError(f"{caller}: {name} must be {wanted}, got {value!r}{at}")
