"""The prompt of a row: the one text that training learns to continue and `generate` continues."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftjax.core.errors import PeftError
from peftjax.io.files import parse_json
from peftjax.train.data.columns import pick_column, shown

PROMPT_GUESSES = ("prompt", "instruction", "question", "input")
COMPLETION_GUESSES = ("completion", "response", "output", "answer")
CONTEXT_COLUMNS = ("input", "context")
"""Beside a guessed prompt, what it is about: often empty."""
SYSTEM_COLUMN, HISTORY_COLUMN = "system", "history"
"""Alpaca's: a text that stands first, and the earlier turns as pairs of what was asked and answered."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptColumns:
    """Which columns a prompt is made of.

    Attributes:
        prompt: what is asked.
        context: what follows it after an empty line, where a row has it.
        system: what stands in front of it, where a row has it.
        history: the turns between system and prompt, where a row has them.
    """

    prompt: str
    context: tuple[str, ...] = ()
    system: str | None = None
    history: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """The names."""
        names = (self.system, self.history, self.prompt, *self.context)
        return tuple(name for name in names if name is not None)


def prompt_columns(names: Sequence[str], prompt_column: str | None, source: str) -> PromptColumns:
    """The columns of a prompt: the one named, or the one guessed and those known to stand beside it.

    Args:
        names: the columns of the file.
        prompt_column: the only column of the prompt, if it is named.
        source: the file, for errors.

    Raises:
        PeftError: there is no such column.
    """
    prompt = pick_column(names, prompt_column, PROMPT_GUESSES, "prompt", source)
    if prompt_column is not None:
        return PromptColumns(prompt)
    context = tuple(name for name in CONTEXT_COLUMNS if name in names and name != prompt)
    system, history = (name if name in names else None for name in (SYSTEM_COLUMN, HISTORY_COLUMN))
    return PromptColumns(prompt, context, system, history)


def prompt_of(
    row: Mapping[str, object],
    columns: PromptColumns,
    *,
    separator: str,
    completion: str = "",
    place: str,
) -> str:
    """The prompt of a row, with the separator at its end.

    Args:
        row: the values by column.
        columns: from `prompt_columns`.
        separator: what stands between prompt and completion, unless one of them has white space there
            or the prompt is empty.
        completion: what follows, where that is known.
        place: of the row, for errors.

    Raises:
        PeftError: a value is missing or has another type.
    """
    before = [optional_text(row, columns.system, place), *_turns(row, columns.history, separator, place)]
    asked = text_of(row, columns.prompt, place)
    about = [optional_text(row, name, place) for name in columns.context]
    return separated("\n\n".join(part for part in (*before, asked, *about) if part), separator, completion)


def separated(prompt: str, separator: str, completion: str = "") -> str:
    """The prompt with the separator at its end, unless white space stands there or it is empty."""
    needed = prompt and not prompt[-1].isspace() and not completion[:1].isspace()
    return prompt + separator if needed else prompt


def text_of(row: Mapping[str, object], column: str, place: str) -> str:
    """The text in a column.

    Raises:
        PeftError: the row has none there.
    """
    value = row.get(column)
    if value is None:
        raise PeftError(f"{place} lacks the column '{column}'")
    if not isinstance(value, str):
        raise PeftError(f"{place}: the {column} is {shown(value)}, not a string")
    return value


def optional_text(row: Mapping[str, object], column: str | None, place: str) -> str:
    """The text in a column, or none where the row has none.

    Raises:
        PeftError: it is not text.
    """
    return "" if column is None or row.get(column) is None else text_of(row, column, place)


def _turns(row: Mapping[str, object], column: str | None, separator: str, place: str) -> list[str]:
    """The earlier turns, each as a prompt with its completion."""
    given = None if column is None else row.get(column)
    if isinstance(given, str) and given.strip():  # In CSV, and in tables that hold JSON as text.
        try:
            given = parse_json(given)
        except ValueError as error:
            raise PeftError(f"{place}: the {column} is not JSON: {error}") from error
    if not given:
        return []
    pairs = given if isinstance(given, list) else [given]
    for pair in pairs:
        texts = isinstance(pair, list | tuple) and all(isinstance(text, str) for text in pair)
        if not texts or len(pair) != 2:
            raise PeftError(
                f"{place}: the {column} has {shown(pair)}, not a pair of what was asked and answered"
            )
    return [separated(asked, separator, answered) + answered for asked, answered in pairs]
