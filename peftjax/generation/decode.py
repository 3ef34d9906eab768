"""Decoding with a cache: the prompt in one pass, then a token at a time, each a pure function.

    logits, decoding = start(model, params, batch, room=n)
    logits, decoding = step(model, params, decoding, tokens)    # at most n times

Under `jax.jit` give the step its state back to write in: `donate_argnums` on `decoding`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peftjax.backbone.backbone import Backbone, Batch, Cache, Params
from peftjax.backbone.context import Context
from peftjax.core.errors import PeftError
from peftjax.generation.prompt import left_padded
from peftjax.interpreter import adapt
from peftjax.models.decoder import DecoderConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """What a decoder knows of the tokens so far.

    Attributes:
        cache: keys and values of T slots per row and layer, in the compute dtype.
        mask: True where a slot is a token or will be one, False at the prompt's padding.
        positions: of the next token.
        index: slot of the next token, the same for all rows.
    """

    cache: Cache
    mask: Bool[Array, "B T"]
    positions: Int[Array, " B"]
    index: Int[Array, ""]


def start(
    model: Backbone, params: Params, batch: Batch, *, room: int
) -> tuple[Float[Array, "B V"], Decoding]:
    """Read the prompts: the logits of each row's next token in float32, and the state to go on from.

    Args:
        model: a decoder with the head "causal_lm".
        params: its parameters, structured weights among them.
        batch: the prompts, as of `left_padded`.
        room: how many tokens `step` will be given.

    Raises:
        PeftError: for a model that does not generate, and as `left_padded`.
    """
    require_generator(model)
    if room < 0:
        raise PeftError(f"room for {room} tokens cannot be made; it must be 0 or more")
    prompt = left_padded(batch)

    def read(params: Params, ids: Array, positions: Array, mask: Array) -> tuple[Array, Cache]:
        hidden, context = model.run_embed(params, {"input_ids": ids, "position_ids": positions})
        # The first slot is static, so that attention is cut to the keys each query sees.
        context = replace(context, mask=mask, cache_index=0)
        cache = model.empty_cache(params, hidden, context)
        hidden, cache = model.run_blocks_cached(params, hidden, context, cache)
        return _last_logits(model, params, hidden, context), cache

    mask = jnp.pad(prompt.mask, ((0, 0), (0, room)), constant_values=True)
    logits, cache = adapt(read)(params, prompt.ids, prompt.positions, mask)
    index = jnp.asarray(prompt.ids.shape[1], jnp.int32)
    return logits, Decoding(cache, mask, prompt.positions[:, -1] + 1, index)


def step(
    model: Backbone, params: Params, decoding: Decoding, tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Decoding]:
    """Read one more token a row: the logits of the next in float32, and the new state.

    The logits are NaN once there is no room left.

    Args:
        model: as of `start`.
        params: as of `start`.
        decoding: from `start` or the step before.
        tokens: what was chosen by the last logits.
    """

    def read(params: Params, decoding: Decoding, tokens: Array) -> tuple[Array, Cache]:
        batch = {"input_ids": tokens[:, None], "position_ids": decoding.positions[:, None]}
        hidden, context = model.run_embed(params, batch)
        context = replace(context, mask=decoding.mask, cache_index=decoding.index)
        hidden, cache = model.run_blocks_cached(params, hidden, context, decoding.cache)
        return _last_logits(model, params, hidden, context), cache

    logits, cache = adapt(read)(params, decoding, tokens)
    logits = jnp.where(decoding.index < decoding.mask.shape[1], logits, jnp.nan)
    return logits, Decoding(cache, decoding.mask, decoding.positions + 1, decoding.index + 1)


def require_generator(model: Any) -> None:
    """Raise a PeftError unless the model is a decoder with a language model's head."""
    if not isinstance(model, Backbone):
        raise PeftError(f"generation needs a Backbone, such as pj.load gives, not a {type(model).__name__}")
    if not isinstance(model.config, DecoderConfig):
        raise PeftError(
            f"a model of the family {model.config.model_type!r} is an encoder and has nothing to generate; "
            "load a decoder"
        )
    if model.head_name != "causal_lm":
        raise PeftError(
            f"this {model.config.model_type} has the head {model.head_name!r} and no next tokens; "
            "load it with head='causal_lm'"
        )


def _last_logits(model: Backbone, params: Params, hidden: Array, context: Context) -> Array:
    logits = model.run_head(params, hidden[:, -1:], context)
    return logits.dense()[:, 0].astype(jnp.float32)
