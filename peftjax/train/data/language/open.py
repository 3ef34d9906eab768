"""A language-modeling data set from a file: which source it is, and what is held out."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.text.chat import ChatTemplate, compile_template
from peftjax.text.tokenizer import Tokenizer
from peftjax.train.data.columns import TEXT_GUESSES
from peftjax.train.data.files import DataFile, data_file, is_held_out
from peftjax.train.data.language import completions, conversations, corpus
from peftjax.train.data.language.dataset import LanguageDataset, LanguageOptions, Source
from peftjax.train.data.language.example import Example, divided_examples
from peftjax.train.data.language.prompts import COMPLETION_GUESSES, PROMPT_GUESSES
from peftjax.train.data.language.rows import TokenRows, corpus_rows, example_rows
from peftjax.train.data.language.truncation import Cut, truncate

logger = logging.getLogger(__name__)


def open_language_data(
    data: str | Path | DataFile,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    eval_data: str | Path | None = None,
    options: LanguageOptions | None = None,
    template: ChatTemplate | None = None,
) -> LanguageDataset:
    """The rows of a training file and an evaluation file.

    Plain text is a corpus. A table is what `options` name columns for, and else what its columns
    look like: chats before prompts with completions before running text. Without an evaluation
    file, a stable hash of each chat's or completion's prompt (of a document's text) holds out about
    a tenth of the training file; of a corpus of a single document it is the last tenth.

    Args:
        data: .jsonl, .parquet, .csv, .tsv, or plain text (.txt): its name, or the open file.
        tokenizer: of the model.
        max_length: tokens of the longest row.
        eval_data: a file of the same kind to evaluate on.
        options: how the rows are made.
        template: writes chats; by default the tokenizer's.

    Raises:
        PeftError: for a file, column, row or option that cannot be used, or when nothing fits.
    """
    options = options or LanguageOptions()
    if max_length < 2:
        raise PeftError(f"max_length is {max_length}, but a row needs a token and the next one: at least 2")
    file = data_file(data)
    source = find_source(file, options)
    items = _read(file, source, options)
    held = None if eval_data is None else _read(data_file(eval_data), source, options)
    parts = _hold_out(items, file.path) if held is None else (items, held)
    (train, train_cut), (evaluation, evaluation_cut) = (
        _rows(
            part, source, tokenizer, max_length, options, template, f"{file.path.name}, examples to {purpose}"
        )
        for part, purpose in zip(parts, ("train on", "evaluate on"))
    )
    return LanguageDataset(file.path.stem, source, train, evaluation, train_cut, evaluation_cut)


def open_language_rows(
    data: str | Path, tokenizer: Tokenizer, *, max_length: int, options: LanguageOptions | None = None
) -> tuple[TokenRows, Cut]:
    """The rows of a whole file, nothing held out, and what did not fit; otherwise `open_language_data`."""
    options = options or LanguageOptions()
    file = data_file(data)
    source = find_source(file, options)
    return _rows(_read(file, source, options), source, tokenizer, max_length, options, None, file.path.name)


def find_source(file: Path | DataFile, options: LanguageOptions) -> Source:
    """What the options say, or name columns for, or what the columns look like.

    Raises:
        PeftError: when it is none of them; the sentence lists the columns.
    """
    if options.source is not None:
        if options.source not in get_args(Source):
            known = tree.nearest(options.source, get_args(Source))
            raise PeftError(f"no source of texts is called {options.source!r}; closest: {known}")
        return options.source
    file = data_file(file)
    if file.path.suffix.lower() in corpus.PLAIN_TEXT:
        return "corpus"
    if options.messages_column:
        return "conversations"
    if options.prompt_column or options.completion_column:
        return _source_of_prompts(file, options.prompt_column)
    if options.text_column:
        return "corpus"
    names = set(file.columns)
    if names & set(conversations.MESSAGE_COLUMNS):
        return "conversations"
    if names & set(PROMPT_GUESSES) and names & set(COMPLETION_GUESSES):
        return _source_of_prompts(file, next(name for name in PROMPT_GUESSES if name in names))
    if names & set(TEXT_GUESSES):
        return "corpus"
    raise PeftError(
        f"the columns of {file.path} ({', '.join(map(repr, file.columns))}) are neither a chat's (messages), "
        "nor a prompt's and a completion's, nor a text's: name one with messages_column, prompt_column and "
        "completion_column, or text_column"
    )


def _source_of_prompts(file: DataFile, prompt: str | None) -> Source:
    """Prompts are texts, or messages of chats that the completion goes on with."""
    if prompt is not None and any(conversations.holds_messages(row.get(prompt)) for _, row in file.rows):
        return "conversations"
    return "completions"


def _read(file: DataFile, source: Source, options: LanguageOptions) -> Sequence[Any]:
    if source == "conversations":
        return conversations.read_conversations(
            file,
            messages_column=options.messages_column or options.prompt_column,
            completion_column=options.completion_column,
        )
    if source == "corpus":
        return corpus.read_corpus(file, text_column=options.text_column)
    return completions.read_completions(
        file,
        prompt_column=options.prompt_column,
        completion_column=options.completion_column,
        separator=options.separator,
    )


def _hold_out(items: Sequence[Any], path: Path) -> tuple[Sequence[Any], Sequence[Any]]:
    """What to train on and what to evaluate on, of one file."""
    if len(items) == 1 and isinstance(items[0], str):
        train, held = corpus.split_document(items[0])
        return [train], [held]
    groups = [item if isinstance(item, str) else item.group for item in items]
    train = [item for item, group in zip(items, groups) if not is_held_out(group)]
    held = [item for item, group in zip(items, groups) if is_held_out(group)]
    if not held or not train:
        raise PeftError(f"{path} has too few rows to hold some out: give an evaluation file")
    return train, held


def _rows(
    items: Sequence[Any],
    source: Source,
    tokenizer: Tokenizer,
    max_length: int,
    options: LanguageOptions,
    template: ChatTemplate | None,
    place: str,
) -> tuple[TokenRows, Cut]:
    """What `_read` gave as rows, and what did not fit into them; of a corpus everything does."""
    if source == "corpus":
        rows = corpus_rows(
            divided_examples(items, lambda part: corpus.tokenize_corpus(part, tokenizer)),
            max_length=max_length,
            pad_id=tokenizer.pad_id,
            attend_across_documents=options.attend_across_documents,
        )
        return rows, Cut()
    if source == "conversations":
        writes = template or compile_template(tokenizer.chat_template(), tokenizer.special_tokens)
        examples = divided_examples(
            items, lambda part: conversations.tokenize_conversations(part, writes, tokenizer)
        )
        _warn_of_open_turns(examples, tokenizer, place)
    else:
        examples = divided_examples(items, lambda part: completions.tokenize_completions(part, tokenizer))
    return _fitting_rows(examples, tokenizer, max_length, options, place)


def _fitting_rows(
    examples: Sequence[Example], tokenizer: Tokenizer, max_length: int, options: LanguageOptions, place: str
) -> tuple[TokenRows, Cut]:
    """The examples in rows, and what did not fit, which is logged too."""
    kept, cut = truncate(
        examples, max_length, prefix=tokenizer.prefix_ids, train_on_prompt=options.train_on_prompt
    )
    if cut != Cut():
        logger.warning("%s (%d): %s", place, len(examples), cut)
    if not kept:
        raise PeftError(f"{place}: none of {len(examples)} can be used with max_length {max_length}: {cut}")
    rows = example_rows(
        kept,
        max_length=max_length,
        pad_id=tokenizer.pad_id,
        packed=options.packed,
        train_on_prompt=options.train_on_prompt,
    )
    return rows, cut


def _warn_of_open_turns(examples: Sequence[Example], tokenizer: Tokenizer, place: str) -> None:
    if count := conversations.count_open_turns(examples, tokenizer):
        logger.warning(
            "%s: the chat template ends %d of the assistant's turns without an end-of-turn token: a model "
            "trained on them does not learn to stop",
            place,
            count,
        )
