"""Labeled texts in two parts, the form every data source returns."""

from dataclasses import dataclass


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
