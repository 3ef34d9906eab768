"""Text classification from JSONL, JSON, CSV, TSV and Parquet files.

CSV is read with its quotes, TSV without any (a quote is a character of the text, as in SST-2).
"""

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peftjax.core.errors import PeftError
from peftjax.io.files import parse_json
from peftjax.train.data import columns as cols
from peftjax.train.data.dataset import (
    LabeledText,
    Split,
    TextDataset,
    class_names,
    label_indices,
    text_and_label,
)

HELD_OUT_SHARE = 0.1

Rows = Iterator[tuple[int, dict[str, object]]]
"""Line number (Parquet: row number), counted from 1, and the row's values by column name."""


@dataclass(frozen=True)
class DataFile:
    """A file of rows, read when its rows are first asked for, and once.

    Raises:
        PeftError: then, as `read_rows`, or when there is no row.
    """

    path: Path

    @cached_property
    def rows(self) -> list[tuple[int, dict[str, object]]]:
        """The rows, each with its line."""
        rows = list(read_rows(self.path))
        if not rows:
            raise PeftError(f"the data file {self.path} has no rows")
        return rows

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that have a value in some row."""
        return cols.filled_columns(row for _, row in self.rows)


def data_file(file: str | Path | DataFile) -> DataFile:
    """The file of that name, or the one that is open already."""
    return file if isinstance(file, DataFile) else DataFile(Path(file))


def file_dataset(
    train: str | Path | DataFile,
    evaluation: str | Path | None = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
) -> TextDataset:
    """A data set from a training file and an evaluation file of any of the formats.

    Labels are strings or integers. The label names are those of the training file, sorted
    (integers as numbers). Without an evaluation file, a stable hash of the text holds out about
    `HELD_OUT_SHARE` of the training file.

    Raises:
        PeftError: a file that is missing, empty, malformed or of an unknown format, a column that
            does not exist or stands twice, a row without its column or its label (-1), fewer than two
            classes, or an evaluation label never trained on.
    """
    train = data_file(train)
    trained = _read(train, text_column, label_column)
    labels = {row.label for row in trained}
    if evaluation is not None:
        held = _read(data_file(evaluation), text_column, label_column)
    else:
        held = [row for row in trained if is_held_out(row.text)]
        trained = [row for row in trained if not is_held_out(row.text)]
        if not held or not trained:
            raise PeftError(f"{train.path} has too few rows to hold some out: give an evaluation file")
    names = class_names(labels, train.path)
    return TextDataset(train.path.stem, _split(trained, names), _split(held, names), names)


def file_split(
    path: str | Path,
    names: tuple[str, ...],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Split:
    """The texts of one file with the labels of a classifier that exists.

    Raises:
        PeftError: as `file_dataset`; a label that is not among `names` is named with its line.
    """
    return _split(_read(data_file(path), text_column, label_column), names)


def _split(rows: list[LabeledText], names: tuple[str, ...]) -> Split:
    return Split(tuple(row.text for row in rows), label_indices(rows, names))


def is_held_out(text: str) -> bool:
    """Whether a stable hash puts the text into the `HELD_OUT_SHARE` to evaluate on."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def read_rows(path: Path) -> Rows:
    """The rows of a file of any of the formats.

    Raises:
        PeftError: when the file is missing, malformed or of an unknown format.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise PeftError(f"{path} has the unknown format '{path.suffix}'; known are {known}")
    try:
        if not path.is_file():
            raise PeftError(f"the data file {path} does not exist")
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise PeftError(f"{path} is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise PeftError(f"cannot read {path}: {error.strerror or error}") from error


def _read(file: DataFile, text_column: str | None, label_column: str | None) -> list[LabeledText]:
    """The labeled texts of one file; a column counts where any row has a value for it."""
    path, names = file.path, file.columns
    text = cols.pick_column(names, text_column, cols.TEXT_GUESSES, "text", str(path))
    label = cols.pick_column(names, label_column, cols.LABEL_GUESSES, "label", str(path))
    cols.warn_of_unused(path, names, (text, label))
    found: list[LabeledText] = []
    for line, row in file.rows:
        place = f"{path}, line {line}"
        for column in (text, label):
            if row.get(column) is None:
                raise PeftError(f"{place} lacks the column '{column}'")
        found.append(text_and_label(row[text], row[label], place))
    return found


def _jsonl(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise PeftError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise PeftError(f"{path}, line {number} is not a JSON object")
            yield number, row


def _json(path: Path) -> Rows:
    """A list of objects; some files of this name hold an object a line instead."""
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        values = None
    if not isinstance(values, list):
        yield from _jsonl(path)
        return
    for number, row in enumerate(values, start=1):
        if not isinstance(row, dict):
            raise PeftError(f"{path}, item {number} is not a JSON object")
        yield number, row


def refuse_zero(text: str, place: object) -> None:
    """Refuse text with a zero byte: UTF-16, or a piece that was never written; each would pass for UTF-8.

    Raises:
        PeftError: the text has one.
    """
    if "\0" in text:
        raise PeftError(f"{place} has a zero byte: it is damaged, or not UTF-8 text")


def _lines(file: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        refuse_zero(line, f"{path}, line {number}")
        yield line


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(file, path), strict=True)
        try:
            header = _next_record(reader) or []
            cols.check_header(header, path)
            while (fields := _next_record(reader)) is not None:
                if fields:
                    yield reader.line_num, _named(header, fields, f"{path}, line {reader.line_num}")
        except csv.Error as error:
            raise PeftError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def _next_record(reader: Iterator[list[str]]) -> list[str] | None:
    """The next record, None at the end; the module's own limit of 131,072 characters is lifted meanwhile."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _tsv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = _lines(file, path)
        header = next(lines, "").rstrip("\r\n").split("\t")
        cols.check_header(header, path)
        for number, line in enumerate(lines, start=2):
            if fields := line.rstrip("\r\n"):
                yield number, _named(header, fields.split("\t"), f"{path}, line {number}")


def _named(header: list[str], fields: list[str], place: str) -> dict[str, object]:
    """A row by column name; a short row lacks its last columns, a long one is an error."""
    if len(fields) > len(header):
        raise PeftError(f"{place} has {len(fields)} fields, the header has {len(header)}")
    return dict(zip(header, fields))


def _parquet(path: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        table = parquet.ParquetFile(path)
        cols.check_header(table.schema_arrow.names, path)
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, {name: _without_nulls(value) for name, value in row.items()}
    except PeftError:
        raise
    except (ArrowException, OSError, ValueError, OverflowError, ImportError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise PeftError(f"{path} is not a Parquet file: {what}") from None


def _without_nulls(value: object) -> object:
    """A value without the fields that Parquet fills with null because another row's struct has them."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
