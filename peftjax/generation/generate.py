"""`generate`: whole continuations of a batch of prompts in one compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from peftjax.backbone.backbone import Backbone, Batch, Params
from peftjax.core.errors import PeftError
from peftjax.generation.decode import require_generator, start, step
from peftjax.generation.prompt import longest, require_prompts
from peftjax.generation.sampling import Choice, choice


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """New tokens.

    Attributes:
        tokens: of each row, filled up with the pad id after its stop token; int32.
        lengths: how many of them a row has, its stop token included; int32.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]


@dataclass(frozen=True, eq=False)
class _Same:
    """A model as a static argument: a program is compiled for this object, its configuration unread."""

    model: Backbone

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.model is self.model

    def __hash__(self) -> int:
        return id(self.model)


def generate(
    model: Backbone,
    params: Params,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    key: Key[Array, ""] | None = None,
) -> Generated:
    """Continue a batch of prompts until every row has stopped or has `max_new_tokens`.

    Compiled once per model object, shape and `stop_ids`; temperature, top_p and the pad id may change.

    Args:
        model: a decoder with the head "causal_lm".
        params: its parameters; structured weights run unmerged, mixed ones per row of the batch.
        batch: `input_ids` [B, P] int32, and optionally `attention_mask` [B, P] (1 = token, padded on
            either side) and `position_ids` [B, P] (default: count the tokens).
        max_new_tokens: N.
        temperature: 0 takes the most probable token (greedy); else tokens are drawn.
        top_k: draw from the k most probable tokens, after the temperature.
        top_p: then from the fewest of these that have this probability together.
        stop_ids: a row ends with any of these tokens.
        pad_id: fills a row up after that.
        key: draws the tokens; needed unless greedy.

    Raises:
        PeftError: for a model that does not generate, a setting out of range, prompts with padding
            between tokens, or more tokens than learned positions; in strict mode as `adapt`.
    """
    require_generator(model)
    require_prompts(batch, model.config.vocab_size)
    if max_new_tokens < 1:
        raise PeftError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    vocabulary = model.config.vocab_size
    if wrong := [token for token in stop_ids if not 0 <= token < vocabulary]:
        raise PeftError(f"stop id {wrong[0]} is not one of the model's {vocabulary} tokens")
    room = model.config.max_positions
    if model.config.rope is None and (needed := longest(batch) + max_new_tokens - 1) > room:
        raise PeftError(
            f"{needed} positions are needed and the model has learned {room}; generate fewer tokens"
        )
    chosen = choice(temperature=temperature, top_k=top_k, top_p=top_p)
    if chosen.temperature is not None and key is None:
        raise PeftError("drawing tokens needs a key; pass key=jax.random.key(seed), or temperature 0")
    return _generate(
        _Same(model), params, dict(batch), chosen, pad_id, key, max_new_tokens, tuple(map(int, stop_ids))
    )


@partial(jax.jit, static_argnames=("same", "count", "stop_ids"))
def _generate(
    same: _Same,
    params: Params,
    batch: Batch,
    choose: Choice,
    pad_id: int | Int[Array, ""],
    key: Key[Array, ""] | None,
    count: int,
    stop_ids: tuple[int, ...],
) -> Generated:
    model = same.model

    def stops(tokens: Int[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.isin(tokens, np.array(stop_ids, np.int32))

    # The last token is chosen and never read, so there is room for one less.
    logits, decoding = start(model, params, batch, room=count - 1)
    first = choose(logits, key, 0)
    rows = first.shape[0]
    tokens = jnp.full((rows, count), pad_id, jnp.int32).at[:, 0].set(first)
    lengths = jnp.ones(rows, jnp.int32)

    def goes_on(state: Any) -> Bool[Array, ""]:
        made, _, _, stopped, *_ = state
        return (made < count) & ~jnp.all(stopped)

    def more(state: Any) -> Any:
        made, tokens, lengths, stopped, last, decoding = state
        logits, decoding = step(model, params, decoding, last)
        last = jnp.where(stopped, pad_id, choose(logits, key, made))
        tokens = tokens.at[:, made].set(last)
        lengths = lengths + ~stopped
        return made + 1, tokens, lengths, stopped | stops(last), last, decoding

    state = (jnp.asarray(1), tokens, lengths, stops(first), first, decoding)
    _, tokens, lengths, *_ = jax.lax.while_loop(goes_on, more, state)
    return Generated(tokens, lengths)
