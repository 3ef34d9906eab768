"""Which column of a table holds the text and which the label, and labels as class indices."""

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from peftjax.core.errors import PeftError

TEXT_GUESSES = ("text", "sentence", "content")
LABEL_GUESSES = ("label", "class", "category")
UNLABELLED = "-1"
"""The label of a row without one, as in the test files of GLUE."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledText:
    """One row of a table: its text, its label as written, and where it stands (for errors)."""

    text: str
    label: str
    place: str


def filled_columns(rows: Iterable[Mapping[str, object]]) -> tuple[str, ...]:
    """The columns that have a value in some row, in the order in which they appear.

    A column may be absent or null in the first rows and still hold something in later ones.
    """
    return tuple(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))


def warn_of_unused(source: object, columns: Iterable[str], used: Collection[str | None]) -> None:
    """Name the columns of `source` that nothing is made of, in one line."""
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
    """The column named `asked`, or without a wish the first of `guesses` that exists.

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


def text_and_label(text: object, label: object, place: str) -> LabelledText:
    """A row checked: the text is a string, the label a string or an integer."""
    if not isinstance(text, str):
        raise PeftError(f"{place}: the text is {shown(text)}, not a string")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise PeftError(f"{place}: the label is {shown(label)}, not a string or an integer")
    return LabelledText(text, str(label), place)


def sorted_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels, sorted: as numbers where all are integers, else as strings."""
    names = set(labels)
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def class_names(labels: Collection[str], source: object) -> tuple[str, ...]:
    """The classes that training labels make, sorted as `sorted_names` does.

    Raises:
        PeftError: when there are fewer than two, or -1 stands among them where it is not the opposite of 1.
    """
    names = sorted_names(labels)
    if len(names) < 2:
        raise PeftError(
            f"{source}: every row has the label {names[0]!r}; a classifier needs two classes or more"
            if names
            else f"{source} has no labels"
        )
    if UNLABELLED in names and set(names) != {UNLABELLED, "1"}:
        raise PeftError(
            f"{source}: some rows have the label {UNLABELLED}, which marks a row without a label; leave such "
            "rows out, or write the class as a word"
        )
    return names


def label_indices(rows: Sequence[LabelledText], names: Sequence[str]) -> tuple[int, ...]:
    """The index in `names` of each row's label.

    Raises:
        PeftError: a label that is not in `names`; the sentence says where.
    """
    index = {name: i for i, name in enumerate(names)}
    for row in rows:
        if row.label not in index:
            shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
            if row.label == UNLABELLED:
                raise PeftError(
                    f"{row.place}: the label {UNLABELLED} marks a row without a label; leave such rows out "
                    f"(the labels of the training data are {shown})"
                )
            raise PeftError(
                f"{row.place}: the label {row.label!r} does not occur in the training data, whose "
                f"labels are {shown}"
            )
    return tuple(index[row.label] for row in rows)
