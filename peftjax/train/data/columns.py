"""The columns of a table: which holds the text, which the label, and which nothing reads."""

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from peftjax.core.errors import PeftError

TEXT_GUESSES = ("text", "sentence", "content")
LABEL_GUESSES = ("label", "class", "category")

logger = logging.getLogger(__name__)


def filled_columns(rows: Iterable[Mapping[str, object]]) -> tuple[str, ...]:
    """The columns that have a value in some row, in the order in which they appear.

    A column may be absent or null in the first rows and still hold something in later ones.
    """
    return tuple(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))


def warn_of_unused(source: object, columns: Iterable[str], used: Collection[str | None]) -> None:
    """Warn, in one line, of the columns of `source` that are not used."""
    if unused := [name for name in columns if name not in used]:
        plural = "s" if len(unused) > 1 else ""
        logger.warning("%s: not used: the column%s %s", source, plural, ", ".join(map(repr, unused)))


def shown(value: object, length: int = 60) -> str:
    """A value as an error shows it: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def check_header(names: Sequence[str], source: object) -> None:
    """Refuse a header that has a name twice: one of the two columns would be lost.

    Raises:
        PeftError: the sentence names the column.
    """
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise PeftError(f"{source}: the header has the column {twice[0]!r} twice; rename one of them")


def pick_column(
    columns: Sequence[str], asked: str | None, guesses: Sequence[str], role: str, source: str
) -> str:
    """The column named `asked`; by default the first of `guesses` that exists.

    Raises:
        PeftError: no such column; the sentence lists the columns that exist.
    """
    wanted = (asked,) if asked is not None else guesses
    for name in wanted:
        if name in columns:
            return name
    near = difflib.get_close_matches(wanted[0], columns, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise PeftError(
        f"{source} has no {role} column {' or '.join(repr(name) for name in wanted)}; its columns "
        f"are {', '.join(map(repr, columns))}: name one with {role}_column{hint}"
    )
