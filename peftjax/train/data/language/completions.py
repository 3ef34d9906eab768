"""Prompts with their completions, from JSONL, CSV, TSV and Parquet files."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftjax.errors import PeftError
from peftjax.models.tokenizer import Tokenizer
from peftjax.train.data.columns import pick_column
from peftjax.train.data.files import read_rows
from peftjax.train.data.language.example import Example, encode_pieces, make_example

PROMPT_GUESSES = ("prompt", "instruction", "input", "question")
COMPLETION_GUESSES = ("completion", "response", "output", "answer")
CONTEXT_COLUMNS = ("input", "context")
"""Beside an `instruction`, what it is about: often empty."""

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
    path: Path,
    *,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    separator: str = "\n",
) -> list[Completion]:
    """The rows of a file, columns guessed from the usual names where none are given.

    Beside a guessed `instruction`, a column `input` or `context` that is not empty follows it after
    an empty line. `separator` goes between prompt and completion unless one of them has white space
    there already, or the prompt is empty.

    Raises:
        PeftError: for a file that cannot be read, a column that does not exist, or a row without it.
    """
    found = []
    prompt = completion = context = None
    for line, row in read_rows(path):
        if prompt is None or completion is None:
            names = list(row)
            prompt = pick_column(names, prompt_column, PROMPT_GUESSES, "prompt", str(path))
            completion = pick_column(names, completion_column, COMPLETION_GUESSES, "completion", str(path))
            if prompt == "instruction" and prompt_column is None:
                context = next((name for name in CONTEXT_COLUMNS if name in names), None)
            logger.info(
                "%s: %r is the prompt%s, %r the completion",
                path,
                prompt,
                f" with {context!r}" if context else "",
                completion,
            )
        place = f"{path}, line {line}"
        given, answer = (_text(row, column, place) for column in (prompt, completion))
        if context is not None and row.get(context):
            given = f"{given}\n\n{_text(row, context, place)}"
        if given and not given[-1].isspace() and not answer[:1].isspace():
            given += separator
        found.append(Completion(given, answer))
    if not found:
        raise PeftError(f"the data file {path} has no rows")
    return found


def tokenise_completions(rows: Sequence[Completion], tokenizer: Tokenizer) -> list[Example]:
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


def _text(row: Mapping[str, object], column: str, place: str) -> str:
    value = row.get(column)
    if value is None:
        raise PeftError(f"{place} lacks the column '{column}'")
    if not isinstance(value, str):
        raise PeftError(f"{place}: the {column} is {value!r}, not a string")
    return value
