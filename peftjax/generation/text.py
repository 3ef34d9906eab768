"""Prompts as text, and what a model writes after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from peftjax.backbone.backbone import Backbone, Batch, Params
from peftjax.core.errors import PeftError
from peftjax.generation.decode import start, step
from peftjax.generation.generate import generate
from peftjax.generation.sampling import Choice
from peftjax.models.vocabulary import require_ids
from peftjax.text.chat import ChatTemplate, render
from peftjax.text.tokenizer import Tokenizer

SHORTEST = 16
"""Columns of a batch are this many or a power of two times as many, so few shapes are compiled."""
UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt.

    Attributes:
        text: without special tokens.
        tokens: how many there are, the stop token included.
        stopped: whether it ended with a stop token, not for lack of room.
    """

    text: str
    tokens: int
    stopped: bool


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text to be continued: the tokenizer's prefix, and no end.

    Raises:
        PeftError: for a text without any token.
    """
    ids, prefix = tokenizer.token_ids([text])[0], list(tokenizer.prefix_ids)
    ids = ids if ids[: len(prefix)] == prefix else prefix + ids
    if not ids:
        raise PeftError(f"the prompt {text!r} has no tokens to continue")
    return ids


def chat_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The ids of a conversation up to where the assistant's next turn begins.

    Args:
        tokenizer: of the model.
        template: the tokenizer's.
        messages: the conversation.
        tools: JSON schemas of functions that the model may call.

    Raises:
        PeftError: as `render`.
    """
    return tokenizer.token_ids([render(template, messages, add_generation_prompt=True, tools=tools)])[0]


def write(
    model: Backbone,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    key: Key[Array, ""],
    **options: Any,
) -> Iterator[Written]:
    """What the model writes after each prompt, in their order.

    Args:
        model: as of `generate`.
        params: as of `generate`.
        tokenizer: whose stop ids end a text.
        prompts: ids, from `prompt_ids` or `chat_ids`.
        max_new_tokens: of each.
        batch_size: prompts at a time.
        key: draws the tokens; batch i draws with `fold_in(key, i)`.
        options: `temperature`, `top_k` and `top_p` of `generate`.
    """
    for number, first in enumerate(range(0, len(prompts), batch_size)):
        rows = prompts[first : first + batch_size]
        missing = min(batch_size, len(prompts)) - len(rows)
        made = generate(
            model,
            params,
            _batch([*rows, *[rows[-1]] * missing], tokenizer.pad_id),
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            key=jax.random.fold_in(key, number),
            **options,
        )
        for row, tokens, length in zip(rows, np.asarray(made.tokens), np.asarray(made.lengths)):
            new = tokens[:length].tolist()
            yield Written(continuation(tokenizer, row, new), len(new), new[-1] in tokenizer.stop_ids)


def stream(
    model: Backbone,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    key: Key[Array, ""],
    choose: Choice,
) -> Iterator[str]:
    """What the model writes after one prompt, piece by piece: `write` of it alone, as it appears.

    Args:
        model: as of `generate`.
        params: as of `generate`.
        tokenizer: whose stop ids end the text.
        prompt: ids, from `prompt_ids` or `chat_ids`.
        max_new_tokens: at most.
        key: draws the tokens.
        choose: from `choice`.

    Raises:
        PeftError: for a token of the prompt that the model lacks.
    """
    require_ids(np.asarray(prompt), model.config.vocab_size)
    own = jax.random.fold_in(key, 0)
    pick = jax.jit(lambda choose, logits, count: choose(logits, own, count))
    advance = jax.jit(partial(step, model), donate_argnums=1)
    begin = jax.jit(partial(start, model, room=max_new_tokens - 1))
    logits, decoding = begin(params, _batch([prompt], tokenizer.pad_id))
    made: list[int] = []
    shown = ""
    while True:
        token: Int[Array, 1] = pick(choose, logits, len(made))
        made.append(int(token[0]))
        text = continuation(tokenizer, prompt, made)
        ends = made[-1] in tokenizer.stop_ids or len(made) == max_new_tokens
        if ends or not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
        if ends:
            return
        logits, decoding = advance(params, decoding, token)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new ids, with the space in front that a tokenizer writes only after other text."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)


def _batch(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    width = SHORTEST
    while width < max(map(len, rows)):
        width *= 2
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
