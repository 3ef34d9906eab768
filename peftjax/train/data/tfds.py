"""Text classification from TensorFlow Datasets, read as array_record: TensorFlow is not needed."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.train.data import columns as cols
from peftjax.train.data.dataset import (
    LabeledText,
    Split,
    TextDataset,
    class_names,
    label_indices,
    text_and_label,
)

PREFIX = "tfds:"
EVALUATION_SPLITS = ("validation", "test")


def tfds_dataset(
    name: str,
    *,
    train_split: str = "train",
    evaluation_split: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    data_dir: str | Path | None = None,
) -> TextDataset:
    """A data set of TensorFlow Datasets by its name, such as `tfds:glue/sst2`.

    Args:
        name: `tfds:NAME`, `tfds:NAME/CONFIG` or with a version; the prefix may be left out.
        train_split: a split in the library's syntax, such as `train` or `train[:10%]`.
        evaluation_split: by default `validation`, and `test` where there is none.
        text_column: the text feature; guessed by default.
        label_column: the label feature; guessed by default.
        data_dir: where data sets are stored, by default the library's own place. A data set that
            is not stored there yet is downloaded and prepared first.

    Raises:
        PeftError: the library is absent, or an unknown data set, split or feature, or an example
            without a label.
    """
    builder = _prepared_builder(name.removeprefix(PREFIX), data_dir)
    features = builder.info.features
    source = f"data set {name}"
    text = cols.pick_column(list(features), text_column, cols.TEXT_GUESSES, "text", source)
    label = cols.pick_column(list(features), label_column, cols.LABEL_GUESSES, "label", source)
    declared = getattr(features[label], "names", None)
    held_out = evaluation_split or _evaluation_split(list(builder.info.splits), source)
    rows = {split: _rows(builder, split, text, label) for split in (train_split, held_out)}
    names = (
        tuple(declared)
        if declared is not None
        else class_names({row.label for row in rows[train_split]}, source)
    )
    if declared is not None:
        rows = {split: _by_name(found, names) for split, found in rows.items()}
    train, evaluation = (
        Split(tuple(row.text for row in rows[split]), label_indices(rows[split], names))
        for split in (train_split, held_out)
    )
    return TextDataset(builder.info.full_name, train, evaluation, names)


def _prepared_builder(name: str, data_dir: str | Path | None) -> Any:
    """The data set's builder, with its array_record files on this machine."""
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ImportError:
        raise PeftError(
            f"the data set {name} needs the package tensorflow-datasets: install peftjax[tfds]"
        ) from None
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]  # a list of all data sets follows
        raise PeftError(f"the data set {name} cannot be loaded: {reason}") from error
    return builder


def _evaluation_split(splits: list[str], source: str) -> str:
    for name in EVALUATION_SPLITS:
        if name in splits:
            return name
    raise PeftError(
        f"{source} has no split 'validation' or 'test'; its splits are {', '.join(splits)}: name "
        "one with evaluation_split, for example 'train[90%:]'"
    )


def _rows(builder: Any, split: str, text: str, label: str) -> list[LabeledText]:
    """The examples of one split, with ClassLabel features still as integers."""
    try:
        source = builder.as_data_source(split)
    except ValueError as error:
        raise PeftError(f"{builder.info.full_name} has no split '{split}': {error}") from error
    found = []
    for number, example in enumerate(source):
        place = f"{builder.info.full_name}, split {split}, example {number}"
        found.append(text_and_label(_plain(example[text]), _plain(example[label]), place))
    if not found:
        raise PeftError(f"{builder.info.full_name}: the split '{split}' has no examples")
    return found


def _plain(value: Any) -> Any:
    """A feature's value as a Python string or number: text is stored as bytes."""
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def _by_name(rows: list[LabeledText], names: tuple[str, ...]) -> list[LabeledText]:
    """Rows whose label is a class name instead of its index; -1 marks hidden labels."""
    for row in rows:
        if int(row.label) < 0:
            raise PeftError(f"{row.place} has no label ({row.label}): choose a labeled split")
    return [LabeledText(row.text, names[int(row.label)], row.place) for row in rows]
