"""Where an adapter is active that acts from its invocation on, and a backbone that tells its weights so."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from peftjax.backbone.backbone import Backbone, Stack
from peftjax.backbone.context import Context
from peftjax.backbone.protocols import Cache, DropoutKey, Params
from peftjax.backbone.rewritten import RewrittenModule
from peftjax.core.errors import PeftError
from peftjax.weights.activated import activate_in_model


def invoked(
    ids: Int[Array, "B S"], tokens: Sequence[int], segments: Int[Array, "B S"] | None = None
) -> Bool[Array, "B S"]:
    """True from the first token of the last occurrence of `tokens` in a row on; nowhere without one.

    Args:
        ids: the tokens of each row.
        tokens: the invocation.
        segments: of packed rows, each of which is read by itself: their numbers, as `segment_ids` of a batch.
    """
    length = ids.shape[1]
    columns = jnp.broadcast_to(jnp.arange(length), ids.shape)
    segments = jnp.zeros_like(ids) if segments is None else segments
    starts = columns <= length - len(tokens)
    for place, token in enumerate(tokens):
        here = (jnp.roll(ids, -place, axis=1) == token) & (jnp.roll(segments, -place, axis=1) == segments)
        starts = starts & here
    # Of each segment the last one counts: that which no other one follows.
    following = lax.cummin(jnp.where(starts, columns, length), axis=1, reverse=True)
    following = jnp.concatenate([following[:, 1:], jnp.full_like(following[:, :1], length)], axis=1)
    followed = (following < length) & _same_segment(segments, jnp.minimum(following, length - 1))
    start = lax.cummax(jnp.where(starts & ~followed, columns, -1), axis=1)
    return (start >= 0) & _same_segment(segments, jnp.maximum(start, 0))


def _same_segment(segments: Array, columns: Array) -> Array:
    return jnp.take_along_axis(segments, columns, axis=1) == segments


@dataclasses.dataclass(frozen=True)
class TellingEmbed(RewrittenModule):
    """The embedding of a backbone, which tells what all blocks share where the adapter is active."""

    tokens: tuple[int, ...]
    name: str

    def apply(self, variables: Any, batch: Any, **options: Any) -> tuple[Float[Array, "B S D"], Context]:
        """The hidden states and the context."""
        if "input_ids" not in batch:
            raise PeftError(f"{self.name}: the invocation is found in input_ids, and the batch has none")
        hidden, context = self.inner.apply(variables, batch, **options)
        active = invoked(batch["input_ids"], self.tokens, context.segments)
        known = context.active or {}
        return hidden, dataclasses.replace(context, active={**known, self.name: active})


@dataclasses.dataclass(frozen=True)
class Telling:
    """A stack whose weights are told which tokens are active; a cache remembers the rows that were invoked.

    Attributes:
        inner: how the blocks are run.
        name: of the adapter.
    """

    inner: Stack
    name: str

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Any:
        """As of `Stack`."""
        return self.inner.run(model, self._told(params, self._active(context)), hidden, context, key)

    def empty_cache(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> Cache:
        """The inner stack's, and no row invoked."""
        params = self._told(params, jnp.zeros(hidden.shape[:2], bool))
        inner = self.inner.empty_cache(model, params, hidden, context)
        return {"inner": inner, "invoked": jnp.zeros(hidden.shape[0], bool)}

    def run_cached(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        cache: Cache,
    ) -> tuple[Any, Cache]:
        """What follows a prompt is active where the prompt was invoked."""
        before = jnp.broadcast_to(cache["invoked"][:, None], hidden.shape[:2])
        # The first slot of a prompt is a number, that of a token after it is traced.
        active = before | self._active(context) if isinstance(context.cache_index, int) else before
        out, inner = self.inner.run_cached(model, self._told(params, active), hidden, context, cache["inner"])
        return out, {"inner": inner, "invoked": active[:, -1]}

    def _active(self, context: Context) -> Array:
        return (context.active or {})[self.name]

    def _told(self, params: Params, active: Array) -> Params:
        return {**params, "blocks": activate_in_model(params["blocks"], active, self.name)}
