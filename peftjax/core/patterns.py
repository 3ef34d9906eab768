"""Regular expressions of users and of files, matched in bounded time and with errors that name them."""

import functools
import re
import time
from dataclasses import dataclass, field

import regex

from peftjax.core.errors import PeftError

# Limits in seconds: of one match, and of all slow matches of a pattern together.
_SECONDS = 0.5
_SECONDS_OF_ALL = 1.0
_LONG = 0.01
_LONGEST = 1_000_000
# `regex` writes counts inside counts out, such as (a{10}){10}; how long the pattern may be then at most.
_LONGEST_WRITTEN_OUT = 4_000_000
_COUNTS = re.compile(r"\{(\d{1,9})?(?:,(\d{1,9})?)?\}")


@dataclass(frozen=True)
class _Program:
    pattern: str
    compiled: regex.Pattern
    spent: list[float] = field(default_factory=list)  # the seconds of the matches that took long


def fullmatches(pattern: str, name: str) -> bool:
    """Whether a user's regular expression matches a whole name.

    Raises:
        PeftError: it is no regular expression, or takes too long.
    """
    return _run(_program(_text(pattern), "", ""), name, whole=True) is not None


def match(pattern: str, name: str, *, before: str = "", after: str = "") -> regex.Match | None:
    """A match, at the start of a name, of a user's regular expression between two of ours.

    Raises:
        PeftError: it is no regular expression, or takes too long.
    """
    return _run(_program(_text(pattern), before, after), name, whole=False)


def _text(pattern: object) -> str:
    if not isinstance(pattern, str):
        raise PeftError(f"a pattern has to be text, not {_short(pattern)}")
    return pattern


def _run(program: _Program, name: str, *, whole: bool) -> regex.Match | None:
    start = time.thread_time()
    try:
        matches = program.compiled.fullmatch if whole else program.compiled.match
        found = matches(name, timeout=_SECONDS)
    except (TimeoutError, MemoryError, RecursionError) as error:
        raise _slow(program.pattern, name) from error
    if (seconds := time.thread_time() - start) > _LONG:
        program.spent.append(seconds)
        if sum(program.spent) > _SECONDS_OF_ALL:
            raise _slow(program.pattern, name)
    return found


def _slow(pattern: str, name: str) -> PeftError:
    return PeftError(
        f"the pattern {_short(pattern)} takes too long to match {_short(name)}; write it without "
        "repetitions inside repetitions"
    )


@functools.lru_cache(maxsize=256)
def _program(pattern: str, before: str, after: str) -> _Program:
    """The compiled pattern; `re`, whose syntax users write, says whether it is one."""
    if len(pattern) > _LONGEST:
        raise PeftError(f"the pattern {_short(pattern)} is longer than {_LONGEST:,} characters")
    length = len(pattern)
    for counts in _COUNTS.findall(pattern):
        length *= max(1, *(int(count or 0) for count in counts))
        if length > _LONGEST_WRITTEN_OUT:
            raise PeftError(f"the pattern {_short(pattern)} has too many repetitions; use * or +")
    whole = f"{before}{pattern}{after}"
    try:
        re.compile(pattern)
        re.compile(whole)
        return _Program(pattern, regex.compile(whole, regex.VERSION0))
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise PeftError(f"the pattern {_short(pattern)} is no regular expression: {error}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
