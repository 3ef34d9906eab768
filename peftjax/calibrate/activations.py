"""Ranges of the activations of a backbone's blocks, over a few batches."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.protocols import Batch, Params
from peftjax.backbone.rewriting import require_backbone, require_one_stack
from peftjax.backbone.rounding import INPUTS, OBSERVED, WEIGHTS, Rounding
from peftjax.calibrate._blocks import cut, own_of
from peftjax.calibrate.reparameterization import require_norms_first, takes_shift
from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.quantize.activations import LogSqrt2, Uniform, require_bits, uniform
from peftjax.quantize.clipping import Tails, best, candidates, no_tails, squared_errors

Ranges = dict[str, Uniform | LogSqrt2]
"""What rounds each activation of a block, arrays [L] or, of channels, [L, D]: a `Uniform` for each of
"attention", "attention_output", "feed_forward" and "feed_forward_output", what enters those layers, and
perhaps a `LogSqrt2` for "attention_weights"."""
AFTER_NORMS = ("attention", "feed_forward")
_CALLER = "activation_ranges"
_Rows = tuple[Float[Array, "N C"], Bool[Array, " N"]]


def activation_ranges(
    model: Backbone,
    params: Params,
    batches: Iterable[Batch],
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    channels: bool = True,
    symmetric: bool | None = None,
) -> Ranges:
    """What rounds the activations of each block with the least squared error (RepQ-ViT, arXiv 2212.08254).

    The range of each is cut off at the best of three percentiles, `peftjax.quantize.clipping.PERCENTILES`.
    What follows a norm has a range for each channel, which `reparameterize` makes one of all. The statistics
    are of the model as it is, whose blocks run one after the other, twice each. Tokens of padding do not
    count, nor do keys that a query does not see.

    Args:
        model: a backbone of one stack of blocks, such as `pj.load` gives.
        params: its parameters; weights may be codes.
        batches: what is calibrated on; its hidden states are all held. RepQ-ViT takes 32 images.
        bits: of what enters linear layers, 2 to 8.
        weight_bits: of attention's weights, likewise, of which a layer's of one batch are held at once; None
            leaves those as they are.
        channels: whether what follows a norm has a range for each channel.
        symmetric: whether there are no zero points. By default there are some, but not for the channels after
            a norm where it, or a layer that reads it, has no bias: that is where `reparameterize` puts them.

    Raises:
        PeftError: the model is no such backbone, or with `channels` one whose norms come after the branches;
            there is no batch; an option is out of range.
    """
    require_bits(_CALLER, "bits", bits)
    if weight_bits is not None:
        require_bits(_CALLER, "weight_bits", weight_bits)
    backbone = require_backbone(_CALLER, model)
    require_one_stack(_CALLER, backbone, "its decoder's blocks read what all of its encoder gives")
    config = backbone.block.config
    if channels:
        require_norms_first(_CALLER, config, "give channels=False")
    embed = jax.jit(lambda params, batch: backbone.run_embed(params, batch))
    streams = [embed({"embed": params["embed"]}, dict(batch)) for batch in batches]
    if not streams:
        raise PeftError(f"{_CALLER}: there is no batch; give at least one")

    makers: dict[str, Any] = {}
    if weight_bits is not None:
        makers[WEIGHTS] = lambda low, high: LogSqrt2(high, weight_bits)
    for name in INPUTS:
        folded = channels and name in AFTER_NORMS
        alone = folded and not takes_shift(params, name) if symmetric is None else symmetric
        makers[name] = partial(uniform, bits=bits, symmetric=alone)
    by_channel = AFTER_NORMS if channels else ()
    observed = partial(_observed, backbone, Rounding(bits, weight_bits, observe=True), by_channel)

    @jax.jit
    def widen(tails: dict[str, Tails], layer: Any, hidden: Array, context: Any) -> dict[str, Tails]:
        return {name: tails[name].joined(*rows) for name, rows in observed(layer, hidden, context)[1].items()}

    @jax.jit
    def compare(tried: Any, layer: Any, hidden: Array, context: Any) -> tuple[Any, Array]:
        out, rows = observed(layer, hidden, context)
        more = {name: squared_errors(tried[name][0], *rows[name]) for name in rows}
        return {name: (codes, errors + more[name]) for name, (codes, errors) in tried.items()}, out

    try_ranges = jax.jit(lambda tails: {name: candidates(tails[name], makers[name]) for name in makers})
    start = _no_tails(config, by_channel, [hidden.shape for hidden, _ in streams], weights=WEIGHTS in makers)
    found = []
    for number in range(backbone.num_layers):
        layer, tails = (cut(params["blocks"], number), own_of(backbone, number)), start
        for stream in streams:
            tails = widen(tails, layer, *stream)
        tried = try_ranges(tails)
        outs = []
        for stream in streams:
            tried, out = compare(tried, layer, *stream)
            outs.append((out, stream[1]))
        chosen = {name: best(*codes_and_errors) for name, codes_and_errors in tried.items()}
        of_all = {name: own for name, own in chosen.items() if name not in by_channel}
        found.append({**chosen, **jax.tree.map(lambda array: array[0], of_all)})
        streams = outs
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *found)


def _observed(
    backbone: Backbone,
    rounding: Rounding,
    by_channel: tuple[str, ...],
    layer: Any,
    hidden: Array,
    context: Any,
) -> tuple[Array, dict[str, _Rows]]:
    """A block's output, and its activations as rows of channels, with those that count."""
    blocks, own = layer
    whole = {"feed_forward_tile": None, "offloaded_tokens": 0.0}  # no loop, out of which nothing can be put
    config = dataclasses.replace(backbone.block.config, rounding=rounding, **whole)
    block, context = backbone.block.clone(config=config), dataclasses.replace(context, **own)

    def run(blocks: Params, hidden: Array) -> Any:
        weights = jax.tree.map(lambda leaf: lax.index_in_dim(leaf, 0, keepdims=False), blocks)
        return block.apply({"params": weights}, hidden, context, mutable=[OBSERVED])

    out, said = adapt(run)(blocks, hidden)
    values = {name: value["value"][0] for name, value in said[OBSERVED]["rounding"].items()}
    mask = jnp.ones(hidden.shape[:2], bool) if context.mask is None else context.mask
    rows = {}
    for name in INPUTS:
        x = values[name].reshape(-1, values[name].shape[-1])
        counts = mask.reshape(-1)
        if name not in by_channel:
            x, counts = x.reshape(-1, 1), jnp.repeat(counts, x.shape[-1])
        rows[name] = x, counts
    if WEIGHTS not in values:
        return out, rows
    weights = values[WEIGHTS].transpose(0, 2, 1, 3)  # [B, N, S, S]
    seen = (weights > 0) & mask[:, None, :, None]
    return out, {**rows, WEIGHTS: (weights.reshape(-1, 1), seen.reshape(-1))}


def _no_tails(
    config: BlockConfig, by_channel: tuple[str, ...], shapes: list[tuple[int, ...]], *, weights: bool
) -> dict[str, Tails]:
    """Tails for all values of hidden states of these shapes [B, S, D], and perhaps attention's weights."""
    tokens = sum(shape[0] * shape[1] for shape in shapes)
    widths = {
        "attention": config.width,
        "attention_output": config.num_heads * config.head_width,
        "feed_forward": config.width,
        "feed_forward_output": config.inner_size,
    }
    tails = {
        name: no_tails(width, tokens) if name in by_channel else no_tails(1, tokens * width)
        for name, width in widths.items()
    }
    if weights:
        tails[WEIGHTS] = no_tails(1, config.num_heads * sum(shape[0] * shape[1] ** 2 for shape in shapes))
    return tails
