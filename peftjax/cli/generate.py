"""`peftjax generate`: a model opened with its adapter, and prompts from the command line or a file."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from peftjax.adapters.files import load_adapter
from peftjax.backbone.backbone import Backbone, Params
from peftjax.core.errors import PeftError
from peftjax.generation.sampling import choice
from peftjax.generation.text import chat_ids, prompt_ids, stream, write
from peftjax.models.load import load
from peftjax.text.chat import compile_template
from peftjax.text.tokenizer import Tokenizer
from peftjax.train.adapter_info import Noted, read_noted
from peftjax.train.config import require_numbers
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
from peftjax.train.open import LANGUAGE_HEAD, BaseModel, find_base, open_tokenizer

COMPLETIONS = "completions"

Messages = Sequence[Mapping[str, Any]]
Chat = tuple[str | Messages, Messages, Messages | None]
"""A chat as it was given, its messages and its tools."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateOptions:
    """What to continue, and how."""

    model: str | None = None
    """The decoder's Hugging Face folder; by default the one that the adapter was trained on."""
    adapter: Path | None = None
    """The folder of an adapter trained on it; it runs unmerged."""
    untie: bool = False
    """Load a tied output layer as a parameter of its own, where the adapter does not say so itself."""
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
    max_new_tokens: int = 128
    """Tokens at most."""
    temperature: float = 0.0
    """0 takes the most probable token each time; higher values draw more freely."""
    top_k: int | None = None
    """Draw from the k most probable tokens."""
    top_p: float | None = None
    """Draw from the fewest most probable tokens that have this probability together."""
    seed: int = 0
    """Of the draws."""
    batch_size: int = 8
    """Prompts at a time."""
    dtype: str = "float32"
    """The dtype to compute in and to hold the weights in: float32, bfloat16 or float16."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, text or messages, and its ids."""

    given: str | Sequence[Mapping[str, Any]]
    ids: list[int]


def run_generate(options: GenerateOptions, show: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """What the model writes after each prompt: `prompt`, `text`, `tokens`, `stopped`.

    Args:
        options: the prompts, the model and how to choose tokens.
        show: takes the text of a single prompt piece by piece as it appears; the list is empty then.

    Raises:
        PeftError: the model has nothing to generate, or the prompts cannot be read.
    """
    if (options.prompt is None) == (options.prompts is None):
        raise PeftError("generate needs a prompt or a file of prompts, one of the two: --prompt or --prompts")
    require_numbers(vars(options))
    chosen = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    choose = choice(**chosen)
    noted = Noted() if options.adapter is None else read_noted(options.adapter)
    base = _base(options, noted)
    tokenizer = open_tokenizer(base)
    prompts = _prompts(options, noted, tokenizer)
    model, params = _open(options, noted, base)
    longest = max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens
    if longest > model.config.max_positions:
        logger.warning("%d tokens: the model was made for %d", longest, model.config.max_positions)
    key = jax.random.key(options.seed)
    common = {"max_new_tokens": options.max_new_tokens, "key": key}
    if show is not None and len(prompts) == 1:
        for piece in stream(model, params, tokenizer, prompts[0].ids, choose=choose, **common):
            show(piece)
        return []
    ids = [prompt.ids for prompt in prompts]
    written = write(model, params, tokenizer, ids, batch_size=options.batch_size, **common, **chosen)
    return [{"prompt": prompt.given, **asdict(made)} for prompt, made in zip(prompts, written)]


def _base(options: GenerateOptions, noted: Noted) -> BaseModel:
    """The model to generate with, a decoder."""
    if noted.head not in (None, LANGUAGE_HEAD):
        raise PeftError(
            f"{options.adapter} was trained for the head {noted.head!r} and has nothing to generate"
        )
    name = options.model or noted.model
    if name is None:
        raise PeftError("generate needs a model: give its folder with --model")
    base = find_base(name)
    if not base.is_decoder:
        raise PeftError(
            f"{base.folder} is a {base.family.name}, an encoder, and has nothing to generate; give a decoder"
        )
    return base


def _open(options: GenerateOptions, noted: Noted, base: BaseModel) -> tuple[Backbone, Params]:
    model, params = load(
        base.folder,
        head=LANGUAGE_HEAD,
        vocab_size=noted.vocab_size,
        untie=options.untie or noted.untied,
        dtype=options.dtype,
        param_dtype=options.dtype,
        described=(base.family, base.config),
    )
    if options.adapter is None:
        return model, params
    adapter = load_adapter(options.adapter, params)
    return adapter.method.model(model), adapter.method.apply(adapter.frozen, adapter.trainable)


def _prompts(options: GenerateOptions, noted: Noted, tokenizer: Tokenizer) -> list[Prompt]:
    if not options.chat:
        return [Prompt(text, prompt_ids(tokenizer, text)) for text in _texts(options, noted)]
    template = compile_template(tokenizer.chat_template(), tokenizer.special_tokens)
    return [
        Prompt(given, chat_ids(tokenizer, template, messages, tools))
        for given, messages, tools in _chats(options)
    ]


def _texts(options: GenerateOptions, noted: Noted) -> list[str]:
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


def _separator(options: GenerateOptions, noted: Noted) -> str:
    """What stands at the end of a prompt: what is asked for, or what the adapter was trained with.

    A prompt of the command line is any text, so only an adapter that was trained on prompts with
    completions puts a separator behind it.
    """
    if options.separator is not None:
        return options.separator
    source = noted.source or (None if options.prompt is not None else COMPLETIONS)
    return noted.rows.separator if source == COMPLETIONS else ""


def _chats(options: GenerateOptions) -> list[Chat]:
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
