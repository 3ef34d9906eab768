"""How much each expert matters to a task: what its router gives it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.protocols import Batch, Params
from peftjax.backbone.rewriting import require_backbone
from peftjax.backbone.router_logits import with_router_logits
from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt


def router_scores(
    model: Backbone,
    params: Params,
    batches: Iterable[Batch],
    *,
    chosen: int = 1,
    least: float = 0.0,
    mask: Callable[[Batch], Array] | None = None,
) -> dict[str, Float[Array, "L E"]]:
    """What routers give each expert where a token chooses it, a mean over tokens (PreMoe, arXiv 2505.17639).

        p = softmax(l)        s_e = mean over tokens of p_e where e is among its `chosen` largest, else 0

    The paper adds logits, of which one below 0 ranks an expert that was chosen below one that never was; here
    they are probabilities. No activation is held: a batch's sums are `[L, E]`.

    Args:
        model: a backbone with experts.
        params: its parameters, structured weights included.
        batches: of the task.
        chosen: how many experts of a token count.
        least: the least probability among those `chosen` that counts.
        mask: which tokens of a batch count, `[B, S]`; by default those of its `attention_mask`.

    Returns:
        The scores of the group "experts", for `select`.

    Raises:
        PeftError: the model has no experts, fewer than `chosen`, or there is no batch.
    """
    backbone = require_backbone("router_scores", model)
    forward = adapt(with_router_logits(backbone))
    count = backbone.block.config.experts.count
    if not 1 <= chosen <= count:
        raise PeftError(f"router_scores: chosen must be from 1 to the {count} experts, got {chosen}")

    @jax.jit
    def sums(params: Any, batch: Any) -> tuple[Array, Array]:
        logits = forward(params, batch)[1].astype(jnp.float32)  # [L, B, S, E]
        largest, numbers = jax.lax.top_k(logits, chosen)
        counts = jax.nn.softmax(largest, axis=-1) >= least
        among = (jax.nn.one_hot(numbers, count) * counts[..., None]).sum(-2)
        tokens = _tokens(batch) if mask is None else mask(batch)
        own = jax.nn.softmax(logits, axis=-1) * among * tokens[None, ..., None]
        return own.sum((1, 2)), tokens.sum()

    total, tokens, seen = 0.0, 0.0, False
    for batch in batches:
        more, number = sums(params, dict(batch))
        total, tokens, seen = total + more, tokens + number, True
    if not seen:
        raise PeftError("router_scores: there is no batch; give at least one")
    return {"experts": total / tokens}


def _tokens(batch: Batch) -> Array:
    """What is no padding, `[B, S]`."""
    ids = batch["input_ids"]
    return batch.get("attention_mask", jnp.ones_like(ids)) != 0
