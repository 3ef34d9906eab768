"""`peftjax generate`: a model opened with its adapter, and prompts from the command line or a file."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from peftjax.errors import PeftError
from peftjax.generation.sampling import choice
from peftjax.generation.text import chat_ids, prompt_ids, stream, write
from peftjax.io.adapter import load_adapter, read_config
from peftjax.io.files import read_json
from peftjax.models.backbone import Backbone, Params
from peftjax.models.chat import compile_template
from peftjax.models.load import CONFIG_FILE, FAMILIES, load
from peftjax.models.tokenizer import Tokenizer, load_tokenizer
from peftjax.train.data.columns import pick_column
from peftjax.train.data.files import read_rows
from peftjax.train.data.language.conversations import ASSISTANT, MESSAGE_COLUMNS, read_conversations
from peftjax.train.data.language.prompts import PROMPT_GUESSES
from peftjax.train.options import model_folder

HEAD = "causal_lm"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateOptions:
    """What to continue, and how."""

    model: str | None = None
    """The decoder's Hugging Face folder; by default the one that the adapter was trained on."""
    adapter: Path | None = None
    """The folder of an adapter trained on it; it runs unmerged."""
    prompt: str | None = None
    """The text to continue, or with --chat what the user says."""
    prompts: Path | None = None
    """A .jsonl, .csv, .tsv or .parquet file with a prompt a row, or with --chat a list of messages."""
    prompt_column: str | None = None
    """The file's column with the prompts or messages; guessed from the usual names."""
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
    for name in ("max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise PeftError(f"{name} must be 1 or more, not {getattr(options, name)}")
    chosen = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    choose = choice(**chosen)
    folder = _folder(options)
    tokenizer = load_tokenizer(folder, decoder=True)
    prompts = _prompts(options, tokenizer)
    model, params = _open(options, folder)
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


def _folder(options: GenerateOptions) -> Path:
    """The model's folder, that of a decoder."""
    name = options.model
    if options.adapter is not None:
        info = read_config(options.adapter)["info"]
        name = name or info.get("model")
        if info.get("head", HEAD) != HEAD:
            raise PeftError(
                f"{options.adapter} was trained for the head {info['head']!r} and has nothing to generate"
            )
    if name is None:
        raise PeftError("generate needs a model: give its folder with --model")
    folder = model_folder(name)
    family = FAMILIES.get(read_json(folder / CONFIG_FILE).get("model_type"))
    if family is not None and HEAD not in family.heads:
        raise PeftError(
            f"{folder} is a {family.name}, an encoder, and has nothing to generate; give a decoder"
        )
    return folder


def _open(options: GenerateOptions, folder: Path) -> tuple[Backbone, Params]:
    model, params = load(folder, head=HEAD, dtype=options.dtype, param_dtype=options.dtype)
    if options.adapter is None:
        return model, params
    adapter = load_adapter(options.adapter, params)
    return adapter.method.model(model), adapter.method.apply(adapter.frozen, adapter.trainable)


def _prompts(options: GenerateOptions, tokenizer: Tokenizer) -> list[Prompt]:
    given = [options.prompt] if options.prompts is None else _read(options.prompts, options)
    if not options.chat:
        return [Prompt(text, prompt_ids(tokenizer, text)) for text in given]
    template = compile_template(tokenizer.chat_template(), tokenizer.special_tokens)
    chats = [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in given]
    return [Prompt(one, chat_ids(tokenizer, template, chat)) for one, chat in zip(given, chats)]


def _read(path: Path, options: GenerateOptions) -> list[Any]:
    """The prompts of a file: texts, or for a chat also lists of messages."""
    rows = list(read_rows(path))
    if not rows:
        raise PeftError(f"the data file {path} has no rows")
    guesses = (*MESSAGE_COLUMNS, *PROMPT_GUESSES) if options.chat else PROMPT_GUESSES
    column = pick_column(list(rows[0][1]), options.prompt_column, guesses, "prompt", str(path))
    if options.chat and isinstance(rows[0][1][column], list):
        chats = read_conversations(path, messages_column=column)
        for chat in chats:
            if chat.messages[-1]["role"] == ASSISTANT:
                raise PeftError(f"{chat.place}: the last message is the assistant's; there is none to answer")
        return [chat.messages for chat in chats]
    for line, row in rows:
        if not isinstance(row.get(column), str):
            raise PeftError(f"{path}, line {line}: the {column} is {row.get(column)!r}, not a string")
    return [row[column] for _, row in rows]
