"""Prompts with their completions, from JSONL, CSV, TSV and Parquet files."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftjax.core.errors import PeftError
from peftjax.text.tokenizer import Tokenizer
from peftjax.train.data.columns import pick_column, warn_of_unused
from peftjax.train.data.files import DataFile, data_file
from peftjax.train.data.language.example import Example, encode_pieces, make_example
from peftjax.train.data.language.prompts import COMPLETION_GUESSES, prompt_columns, prompt_of, text_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """One row: what is given, and what the model is to write after it."""

    prompt: str
    completion: str

    @property
    def group(self) -> str:
        """What decides on which side of the split the row is: rows of one prompt stay together."""
        return self.prompt or self.completion


def read_completions(
    file: Path | DataFile,
    *,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    separator: str = "\n",
) -> list[Completion]:
    """The rows of a file, columns guessed from the usual names where none are given.

    Beside a guessed prompt, the columns `system`, `history` (pairs of what was asked and answered),
    `input` and `context` stand in it where they are not empty, with empty lines between; see
    `prompts.prompt_of`. Columns of no use are named in the log. `separator` goes between prompt and
    completion unless one of them has white space there already, or the prompt is empty.

    Raises:
        PeftError: for a file that cannot be read, a column that does not exist, or a row without it.
    """
    file = data_file(file)
    path, rows, names = file.path, file.rows, file.columns
    columns = prompt_columns(names, prompt_column, str(path))
    completion = pick_column(names, completion_column, COMPLETION_GUESSES, "completion", str(path))
    logger.info("%s: %s make the prompt, %r the completion", path, columns.all, completion)
    warn_of_unused(path, names, (*columns.all, completion))
    found = []
    for line, row in rows:
        place = f"{path}, line {line}"
        answer = text_of(row, completion, place)
        prompt = prompt_of(row, columns, separator=separator, completion=answer, place=place)
        found.append(Completion(prompt, answer))
    return found


def tokenize_completions(rows: Sequence[Completion], tokenizer: Tokenizer) -> list[Example]:
    """Prompt, completion and eos of each row; the completion and its eos are the model's own.

    Raises:
        PeftError: when the tokenizer has no eos.
    """
    prefix, eos = list(tokenizer.prefix_ids), end_of_text(tokenizer)
    examples = []
    for prompt, completion in encode_pieces(tokenizer, [(row.prompt, row.completion) for row in rows]):
        begins = [] if prompt[: len(prefix)] == prefix else prefix
        ends = [] if completion[-1:] and completion[-1] in tokenizer.stop_ids else [eos]
        examples.append(make_example([(begins + prompt, False), (completion + ends, True)]))
    return examples


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that ends a text: eos, or else the first that stops generation.

    Raises:
        PeftError: when there is none.
    """
    if not tokenizer.stop_ids:
        raise PeftError("the tokenizer has no end of text: name an eos_token in its tokenizer_config.json")
    return tokenizer.stop_ids[0]
