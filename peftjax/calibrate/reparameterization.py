"""Scales moved out of an activation into the norm before it and the weights after it, exactly.

    x = norm(h),  y = x W + b        x' = x / r + c,  W' = diag(r) W,  b' = b - (r ∘ c) W:  y is the same

Papers: Li et al., "RepQ-ViT", ICCV 2023, arXiv 2212.08254, whose r and c make one range fit all channels;
Xiao et al., "SmoothQuant", ICML 2023, arXiv 2211.10438, whose r leaves outliers to the weights.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.protocols import Params
from peftjax.backbone.rewriting import require_backbone, require_one_stack
from peftjax.core import tree
from peftjax.core.checks import fraction
from peftjax.core.errors import PeftError
from peftjax.quantize.activations import LogSqrt2, Uniform, uniform
from peftjax.weights.base import Weight

READERS = {"attention": ("qkv", "query", "key", "value"), "feed_forward": ("up", "gate")}
"""The layers that read a branch's norm, in the branch of that name."""
_TINY = float(jnp.finfo(jnp.float32).tiny)


class Reparameterized(NamedTuple):
    """A model whose activations have one range for all channels.

    Attributes:
        params: of the same function as before.
        ranges: of one range for all channels each, arrays [L].
        factors: the least and the greatest r after each norm. Where they are far apart, over 100, rows of the
            weights have become as different, and need smaller groups or more bits.
    """

    params: Params
    ranges: dict[str, Uniform | LogSqrt2]
    factors: dict[str, tuple[float, float]]


def reparameterize(
    model: Backbone, params: Params, ranges: Mapping[str, Uniform | LogSqrt2]
) -> Reparameterized:
    """Ranges of channels made one of all, without a change of any code or of the model's function.

        s' = mean(s),  z' = round(mean(z)),  r = s / s',  c = s' (z - z')
        round(x' / s') + z' = round(x / s) + z

    Weights are to be coded after it. The model is as exact as its parameters' dtype.

    Args:
        model: a backbone whose norms come before the branches.
        params: its parameters; norms, and the layers that read them, are arrays.
        ranges: of `pj.calibrate.activation_ranges`; those of one range for all stay as they are.

    Raises:
        PeftError: the model is no such backbone; a weight is no array; there are zero points, and no biases
            that take them; the ranges are not of this model.
    """
    changes, found = {}, dict(ranges)
    for name, own in _of_channels("reparameterize", ranges).items():
        scale, zero = own.scale.mean(-1), None
        ratio, shift = own.scale / scale[:, None], None
        if own.zero is not None:
            zero = jnp.round(own.zero.mean(-1))
            shift = scale[:, None] * (own.zero - zero[:, None])
        changes[name] = ratio, shift
        found[name] = Uniform(scale, zero, own.bits)
    params = rescaled("reparameterize", model, params, changes)
    return Reparameterized(params, found, _extremes(changes))


def migrate_outliers(
    model: Backbone, params: Params, ranges: Mapping[str, Uniform | LogSqrt2], *, strength: float = 0.5
) -> Reparameterized:
    """Channels divided by the larger the larger they are (SmoothQuant, arXiv 2211.10438).

        r_c = max|x_c|^α / max|W_c|^(1-α),  c = 0

    The weights are those of all the layers that read the norm. The one range is what holds all channels.

    Args:
        model: as of `reparameterize`.
        params: its parameters.
        ranges: as there.
        strength: α, in [0, 1).

    Raises:
        PeftError: as there, but that zero points need no biases.
    """
    fraction("migrate_outliers", "strength", strength)
    changes, found = {}, dict(ranges)
    for name, own in _of_channels("migrate_outliers", ranges).items():
        low, high = (limit * own.scale for limit in own.limits)
        size = jnp.maximum(jnp.abs(low), jnp.abs(high))
        kernels = [params["blocks"][name][layer]["kernel"] for layer in _readers(params, name)]
        of_weights = jnp.max(jnp.stack([_largest_of_rows(name, kernel) for kernel in kernels]), 0)
        ratio = size**strength / jnp.maximum(of_weights, _TINY) ** (1 - strength)
        ratio = jnp.where((size > 0) & (of_weights > 0), ratio, 1)
        changes[name] = ratio, None
        ends = (low / ratio).min(-1), (high / ratio).max(-1)
        found[name] = uniform(*ends, own.bits, symmetric=own.zero is None)
    params = rescaled("migrate_outliers", model, params, changes)
    return Reparameterized(params, found, _extremes(changes))


def rescaled(
    caller: str, model: Backbone, params: Params, changes: Mapping[str, tuple[Array, Array | None]]
) -> Params:
    """The parameters of the same function in which what follows a norm is `x / r + c`.

    Args:
        caller: the function that asks.
        model: a backbone whose norms come before the branches.
        params: its parameters.
        changes: r `[L, D]`, and c in that shape or None for 0, of the branches "attention", "feed_forward".

    Raises:
        PeftError: as of `reparameterize`.
    """
    backbone = require_backbone(caller, model)
    require_one_stack(caller, backbone, "the norms of its decoder have other readers")
    config = backbone.block.config
    require_norms_first(caller, config, "calibrate with channels=False, and round those ranges as they are")
    offset = 1.0 if config.norm == "rms_plus_one" else 0.0
    blocks = dict(params["blocks"])
    for branch, (ratio, shift) in changes.items():
        norm = blocks[f"{branch}_norm"]
        _require_arrays(caller, f"blocks/{branch}_norm", norm)
        if ratio.shape != norm["scale"].shape:
            raise PeftError(
                f"{caller}: the ranges of {branch!r} are of {list(ratio.shape)} layers and channels, the "
                f"norms of the model of {list(norm['scale'].shape)}; calibrate this model"
            )
        if shift is not None and not takes_shift(params, branch):
            raise PeftError(
                f"{caller}: the ranges of {branch!r} have zero points, and its norm, or a layer that "
                "reads it, has no bias to take them; calibrate with symmetric=True"
            )
        blocks[f"{branch}_norm"] = _rescaled_norm(norm, ratio, shift, offset)
        readers = {layer: blocks[branch][layer] for layer in _readers(params, branch)}
        for layer, own in readers.items():
            _require_arrays(caller, f"blocks/{branch}/{layer}", own)
        changed = {layer: _rescaled_layer(own, ratio, shift) for layer, own in readers.items()}
        blocks[branch] = {**blocks[branch], **changed}
    return {**params, "blocks": blocks}


def require_norms_first(caller: str, config: BlockConfig, remedy: str) -> None:
    """Raise a PeftError for blocks whose norms' results are the residual stream."""
    if config.norm_order == "post":
        raise PeftError(
            f"{caller}: the norms of this model come after the branches, and what they give is the residual "
            f"stream too, which nothing scales back; {remedy}"
        )


def takes_shift(params: Params, branch: str) -> bool:
    """Whether a branch's norm and the layers that read it have biases."""
    blocks = params["blocks"]
    readers = [blocks[branch][layer] for layer in _readers(params, branch)]
    return all("bias" in own for own in (blocks[f"{branch}_norm"], *readers))


def _readers(params: Params, branch: str) -> list[str]:
    return [layer for layer in READERS[branch] if layer in params["blocks"][branch]]


def _rescaled_norm(norm: Params, ratio: Array, shift: Array | None, offset: float) -> Params:
    scale = (offset + norm["scale"].astype(jnp.float32)) / ratio - offset
    new = {**norm, "scale": scale.astype(norm["scale"].dtype)}
    if "bias" in norm:
        bias = norm["bias"].astype(jnp.float32) / ratio + (0 if shift is None else shift)
        new["bias"] = bias.astype(norm["bias"].dtype)
    return new


def _rescaled_layer(layer: Params, ratio: Array, shift: Array | None) -> Params:
    kernel = layer["kernel"].astype(jnp.float32) * ratio[..., None]
    new = {**layer, "kernel": kernel.astype(layer["kernel"].dtype)}
    if shift is not None:
        moved = jnp.einsum("ld,ldf->lf", shift, kernel, precision="highest")
        new["bias"] = (layer["bias"].astype(jnp.float32) - moved).astype(layer["bias"].dtype)
    return new


def _require_arrays(caller: str, where: str, part: Params) -> None:
    for name, leaf in part.items():
        if isinstance(leaf, Weight) or not tree.is_array(leaf):
            raise PeftError(
                f"{caller}: '{where}/{name}' is a {type(leaf).__name__}, which cannot be rescaled; do this "
                "with the floats, and code or adapt them after it"
            )


def _largest_of_rows(branch: str, kernel: Any) -> Array:
    _require_arrays("migrate_outliers", f"blocks/{branch}", {"kernel": kernel})
    return jnp.abs(kernel.astype(jnp.float32)).max(-1)


def _of_channels(caller: str, ranges: Mapping[str, Uniform | LogSqrt2]) -> dict[str, Uniform]:
    """The ranges that have one for each channel."""
    found = {
        name: own
        for name, own in ranges.items()
        if name in READERS and isinstance(own, Uniform) and own.scale.ndim == 2
    }
    if not found:
        raise PeftError(f"{caller}: no range is of channels; calibrate with channels=True")
    return found


def _extremes(changes: Mapping[str, tuple[Array, Array | None]]) -> dict[str, tuple[float, float]]:
    return {name: (float(ratio.min()), float(ratio.max())) for name, (ratio, _) in changes.items()}
