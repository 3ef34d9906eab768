"""`peftjax generate`: a model opened with its adapter, and what it writes after prompts."""

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from peftjax.adapters.files import load_adapter
from peftjax.backbone.backbone import Backbone, Params
from peftjax.cli.prompts import PromptOptions, read_prompts
from peftjax.cli.report import print_written, show
from peftjax.core.errors import PeftError
from peftjax.generation.sampling import choice
from peftjax.generation.text import stream, write
from peftjax.models.load import load
from peftjax.parallel.mesh import find_mesh
from peftjax.train.adapter_info import Noted, read_noted
from peftjax.train.config import require_numbers
from peftjax.train.open import LANGUAGE_HEAD, BaseModel, find_base, open_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generate(PromptOptions):
    """Let a decoder continue a prompt, or each prompt of a file."""

    model: str | None = None
    """The decoder's Hugging Face folder; by default the one that the adapter was trained on."""
    adapter: Path | None = None
    """The folder of an adapter trained on it; it runs unmerged."""
    untie: bool = False
    """Load a tied output layer as a parameter of its own, where the adapter does not say so itself."""
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
    mesh: str | None = None
    """All devices by axis, such as 'fsdp=2,tensor=4', or 'all' for fsdp; by default one device."""
    json: bool = False
    """Print the texts as JSON, one entry a prompt."""


def run_generate(command: Generate, console: Console) -> None:
    """Print what the model writes; on a terminal, the text of a single prompt as it appears."""
    live = sys.stdout.isatty() and not command.json
    written = continue_prompts(command, (lambda text: print(text, end="", flush=True)) if live else None)
    show(command.json, written, lambda: print_written(written))


def continue_prompts(options: Generate, show: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
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
    prompts = read_prompts(options, noted, tokenizer)
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


def _base(options: Generate, noted: Noted) -> BaseModel:
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


def _open(options: Generate, noted: Noted, base: BaseModel) -> tuple[Backbone, Params]:
    model, params = load(
        base.folder,
        head=LANGUAGE_HEAD,
        vocab_size=noted.vocab_size,
        untie=options.untie or noted.untied,
        dtype=options.dtype,
        param_dtype=options.dtype,
        mesh=find_mesh(options.mesh),
        described=(base.family, base.config),
    )
    if options.adapter is None:
        return model, params
    adapter = load_adapter(options.adapter, params)
    return adapter.method.model(model), adapter.method.apply(adapter.frozen, adapter.trainable)
