"""Prompt tokens: trained vectors after the tokens of every row, for the blocks and not for the head.

    h [B, S, D] -> blocks([h; p]) without the last P,   p [P, D]

They stand at the end, where they move no token, and every token of a stack that is not causal reads them.
Backward keeps for them what the blocks keep for any token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.backbone.backbone import Backbone, Stack
from peftjax.backbone.context import Context
from peftjax.backbone.protocols import DropoutKey, Params
from peftjax.backbone.rewriting import require_one_stack
from peftjax.core.errors import PeftError

STD = 0.02


def init_prompts(key: Array, length: int, width: int) -> Float[Array, "P D"]:
    """N(0, 0.02²), float32."""
    return STD * jax.random.normal(key, (length, width))


def with_prompts(method: str, backbone: Backbone) -> Backbone:
    """The backbone whose blocks read `params[method]["prompts"]` after the tokens.

    Raises:
        PeftError: it is causal or an encoder-decoder.
    """
    require_one_stack(method, backbone, "its two stacks have no common row of tokens for prompts")
    if backbone.block.config.causal:
        raise PeftError(
            f"{method}: prompts come last, and no token of a causal stack reads them; use pj.prefix"
        )
    return dataclasses.replace(backbone, stack=PromptStack(method, backbone.stack))


@dataclasses.dataclass(frozen=True)
class PromptStack:
    """Runs the blocks on the tokens and the prompts.

    Attributes:
        name: of the method.
        inner: the stack as it was.
    """

    name: str
    inner: Stack

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Float[Array, "B S D"]:
        """What `inner` gives for the tokens."""
        if context.segments is not None:
            raise PeftError(f"{self.name}: prompts are of a whole row, and this one has several texts in it")
        batch, length, width = hidden.shape
        prompts = params[self.name]["prompts"].astype(hidden.dtype)
        rows = jnp.broadcast_to(prompts, (batch, len(prompts), width))
        if context.mask is not None:
            seen = jnp.ones((batch, len(prompts)), bool)
            context = dataclasses.replace(context, mask=jnp.concatenate([context.mask, seen], axis=1))
        out = self.inner.run(model, params, jnp.concatenate([hidden, rows], axis=1), context, key)
        return out[:, :length]

    def empty_cache(self, *_: Any) -> Any:
        """Raise a PeftError: a stack that is not causal does not generate."""
        raise PeftError(f"{self.name}: prompts are for encoders, which do not generate")

    run_cached = empty_cache
