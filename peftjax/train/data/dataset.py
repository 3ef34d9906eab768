"""Labeled texts: a row of a source, its label as a class index, and a data set in two parts."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from peftjax.core.errors import PeftError
from peftjax.train.data.columns import shown

UNLABELED = "-1"
"""The label of a row without one, as in the test files of GLUE."""


@dataclass(frozen=True)
class LabeledText:
    """One row of a table: its text, its label as written, and where it stands (for errors)."""

    text: str
    label: str
    place: str


@dataclass(frozen=True)
class Split:
    """Texts and their labels, in the order of the source."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    """Indices into `TextDataset.label_names`, one per text."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextDataset:
    """A text-classification data set: examples to train on, and examples to evaluate on."""

    name: str
    train: Split
    evaluation: Split
    label_names: tuple[str, ...]


def text_and_label(text: object, label: object, place: str) -> LabeledText:
    """A row checked: the text is a string, the label a string or an integer."""
    if not isinstance(text, str):
        raise PeftError(f"{place}: the text is {shown(text)}, not a string")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise PeftError(f"{place}: the label is {shown(label)}, not a string or an integer")
    return LabeledText(text, str(label), place)


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
    if UNLABELED in names and set(names) != {UNLABELED, "1"}:
        raise PeftError(
            f"{source}: some rows have the label {UNLABELED}, which marks a row without a label; leave such "
            "rows out, or write the class as a word"
        )
    return names


def label_indices(rows: Sequence[LabeledText], names: Sequence[str]) -> tuple[int, ...]:
    """The index in `names` of each row's label.

    Raises:
        PeftError: a label that is not in `names`; the sentence says where.
    """
    index = {name: i for i, name in enumerate(names)}
    for row in rows:
        if row.label not in index:
            known = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
            if row.label == UNLABELED:
                raise PeftError(
                    f"{row.place}: the label {UNLABELED} marks a row without a label; leave such rows out "
                    f"(the labels of the training data are {known})"
                )
            raise PeftError(
                f"{row.place}: the label {row.label!r} does not occur in the training data, whose "
                f"labels are {known}"
            )
    return tuple(index[row.label] for row in rows)
