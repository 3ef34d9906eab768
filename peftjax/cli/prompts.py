"""The prompts of `peftjax generate`: from the command line or a file, made as in training."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.generation.text import chat_ids, prompt_ids
from peftjax.text.chat import compile_template
from peftjax.text.tokenizer import Tokenizer
from peftjax.train.adapter_info import Noted
from peftjax.train.data.columns import pick_column, warn_of_unused
from peftjax.train.data.files import DataFile
from peftjax.train.data.language.conversations import (
    ASSISTANT,
    MESSAGE_COLUMNS,
    TOOLS_COLUMN,
    holds_messages,
    read_conversations,
    read_tools,
)
from peftjax.train.data.language.prompts import (
    COMPLETION_GUESSES,
    PROMPT_GUESSES,
    optional_text,
    prompt_columns,
    prompt_of,
    separated,
)

COMPLETIONS = "completions"

Messages = Sequence[Mapping[str, Any]]
Chat = tuple[str | Messages, Messages, Messages | None]
"""A chat as it was given, its messages and its tools."""


@dataclass(frozen=True)
class PromptOptions:
    """What to continue."""

    prompt: str | None = None
    """The text to continue, or with --chat what the user says."""
    prompts: Path | None = None
    """A .jsonl, .csv, .tsv or .parquet file with a prompt a row, or with --chat a list of messages."""
    prompt_column: str | None = None
    """The file's column with the prompts or messages; guessed from the usual names."""
    separator: str | None = None
    """Goes behind a prompt that does not end in white space: by default what the adapter was trained
    with, and a line break behind the prompts of a file."""
    chat: bool = False
    """Put the prompts in the model's chat template and let the assistant answer."""


@dataclass(frozen=True)
class Asked:
    """A prompt as it was given, text or messages, and its ids."""

    given: str | Messages
    ids: list[int]


def read_prompts(options: PromptOptions, noted: Noted, tokenizer: Tokenizer) -> list[Asked]:
    """The prompts that the options name.

    Args:
        options: the prompts, or their file.
        noted: beside the adapter, or nothing.
        tokenizer: of the model.

    Raises:
        PeftError: they cannot be read, have no token, or do not fit the chat template.
    """
    if not options.chat:
        return [Asked(text, prompt_ids(tokenizer, text)) for text in _texts(options, noted)]
    template = compile_template(tokenizer.chat_template(), tokenizer.special_tokens)
    return [
        Asked(given, chat_ids(tokenizer, template, messages, tools))
        for given, messages, tools in _chats(options)
    ]


def _texts(options: PromptOptions, noted: Noted) -> list[str]:
    """The texts to continue, as training makes the prompts of the same rows."""
    separator = _separator(options, noted)
    if options.prompt is not None:
        return [separated(options.prompt, separator)]
    file = DataFile(Path(str(options.prompts)))
    path, rows, names = file.path, file.rows, file.columns
    columns = prompt_columns(names, options.prompt_column, str(path))
    answer = next((name for name in COMPLETION_GUESSES if name in names), None)
    warn_of_unused(path, names, (*columns.all, answer))
    made = []
    for line, row in rows:
        known = row.get(answer) if answer is not None else None
        completion = known if isinstance(known, str) else ""
        place = f"{path}, line {line}"
        made.append(prompt_of(row, columns, separator=separator, completion=completion, place=place))
    return made


def _separator(options: PromptOptions, noted: Noted) -> str:
    """What stands at the end of a prompt: what is asked for, or what the adapter was trained with.

    A prompt of the command line is any text, so only an adapter that was trained on prompts with
    completions puts a separator behind it.
    """
    if options.separator is not None:
        return options.separator
    source = noted.source or (None if options.prompt is not None else COMPLETIONS)
    return noted.rows.separator if source == COMPLETIONS else ""


def _chats(options: PromptOptions) -> list[Chat]:
    """Conversations with their tools; a text is what the user says."""
    if options.prompt is not None:
        return [(options.prompt, [{"role": "user", "content": options.prompt}], None)]
    file = DataFile(Path(str(options.prompts)))
    path, rows, names = file.path, file.rows, file.columns
    guesses = (*MESSAGE_COLUMNS, *PROMPT_GUESSES)
    column = pick_column(names, options.prompt_column, guesses, "prompt", str(path))
    if column in MESSAGE_COLUMNS or any(holds_messages(row.get(column)) for _, row in rows):
        chats = read_conversations(file, messages_column=column, answered=False)
        for chat in chats:
            if chat.messages[-1]["role"] == ASSISTANT:
                raise PeftError(f"{chat.place}: the last message is the assistant's; there is none to answer")
        return [(chat.messages, chat.messages, chat.tools) for chat in chats]
    columns = prompt_columns(names, options.prompt_column, str(path))
    said = dataclasses.replace(columns, system=None)
    found: list[Chat] = []
    for line, row in rows:
        place = f"{path}, line {line}"
        text = prompt_of(row, said, separator="", place=place)
        messages = [{"role": "user", "content": text}]
        if system := optional_text(row, columns.system, place):
            messages.insert(0, {"role": "system", "content": system})
        found.append((text, messages, read_tools(row.get(TOOLS_COLUMN), place)))
    warn_of_unused(path, names, (*columns.all, TOOLS_COLUMN))
    return found
