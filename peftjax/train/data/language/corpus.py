"""Running text: a plain text file (one document), or the text column of a table (a document a row)."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.io.files import require_file
from peftjax.text.tokenizer import Tokenizer
from peftjax.train.data.columns import TEXT_GUESSES, pick_column, shown, warn_of_unused
from peftjax.train.data.files import HELD_OUT_SHARE, DataFile, data_file, refuse_zero
from peftjax.train.data.language.completions import end_of_text
from peftjax.train.data.language.example import Example

PLAIN_TEXT = (".txt", ".text", ".md")

logger = logging.getLogger(__name__)


def read_corpus(file: Path | DataFile, *, text_column: str | None = None) -> list[str]:
    """The documents of a file; empty ones are left out and counted in the log.

    Raises:
        PeftError: for a file that cannot be read or has no text, or a row without its column.
    """
    file = data_file(file)
    path = file.path
    if path.suffix.lower() in PLAIN_TEXT:
        documents = [_plain_text(path)]
    else:
        documents = _column(file, text_column)
    found = [text for text in documents if text.strip()]
    if not found:
        raise PeftError(f"the data file {path} has no text")
    if len(found) < len(documents):
        logger.warning("%s: left out %d empty documents", path, len(documents) - len(found))
    return found


def split_document(text: str) -> tuple[str, str]:
    """The text, and its last `HELD_OUT_SHARE` from the start of a line (of a word, in a single line)."""
    at = int(len(text) * (1 - HELD_OUT_SHARE))
    for mark in ("\n", " "):
        if (found := text.find(mark, at)) >= 0 and text[found + 1 :].strip():
            return text[: found + 1], text[found + 1 :]
    raise PeftError("the text is too short to hold a part out: give an evaluation file")


def tokenize_corpus(documents: Sequence[str], tokenizer: Tokenizer) -> list[Example]:
    """Every document as ids between the tokenizer's prefix (bos or nothing) and eos.

    Raises:
        PeftError: when the tokenizer has no eos.
    """
    eos = end_of_text(tokenizer)
    examples = []
    for ids in tokenizer.token_ids(documents):
        tokens = np.array([*tokenizer.prefix_ids, *ids, eos], np.int32)
        examples.append(Example(tokens, np.ones(len(tokens), bool)))
    return examples


def _plain_text(path: Path) -> str:
    require_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PeftError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PeftError(f"{path} is not UTF-8 text ({error.reason})") from None
    refuse_zero(text, path)
    return text


def _column(file: DataFile, text_column: str | None) -> list[str]:
    path, rows, names = file.path, file.rows, file.columns
    column = pick_column(names, text_column, TEXT_GUESSES, "text", str(path))
    warn_of_unused(path, names, (column,))
    for line, row in rows:
        if not isinstance(row.get(column), str):
            raise PeftError(f"{path}, line {line}: the {column} is {shown(row.get(column))}, not a string")
    return [str(row[column]) for _, row in rows]
