"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the scalings of its frequencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peftjax.backbone.context import Context, Rotation
from peftjax.core.errors import PeftError

Positions = Int[Array, "#B S"]
Frequencies = Float[Array, " h"] | np.ndarray


def rotate(x: Float[Array, "B S N H"], rotation: Rotation) -> Float[Array, "B S N H"]:
    """Turn the pairs `(x[i], x[i + H/2])` by their position's angles; computed in float32."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rotation(
    positions: Positions, head_dim: int, settings: Mapping[str, Any], max_positions: int
) -> Rotation:
    """Cosines and sines for `positions` under a checkpoint's rope settings.

    `angle[p, i] = p f_i` with `f_i = theta ** (-2 i / H)` after the scaling that `settings` names.

    Args:
        positions: of every token; "dynamic" and "longrope" also read the largest.
        head_dim: H, even.
        settings: what `read_rope` gave.
        max_positions: the checkpoint's `max_position_embeddings`.

    Raises:
        PeftError: for a `rope_type` that is not in `FREQUENCIES`, or factors that do not fit H.
    """
    kind = rope_type(settings)
    frequencies, factor = FREQUENCIES[kind](head_dim, settings, max_positions, positions)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def layer_rotation(context: Context) -> Rotation:
    """The rotation of the layer at hand: `local_rotation` where `local` is set, else `rotation`."""
    assert context.rotation is not None
    if context.local_rotation is None:
        return context.rotation
    return jax.tree.map(partial(jnp.where, context.local), context.local_rotation, context.rotation)


def rope_type(settings: Mapping[str, Any]) -> str:
    """The name of the scaling, "default" when there is none.

    Raises:
        PeftError: for a name that is not in `FREQUENCIES`.
    """
    kind = settings.get("rope_type", settings.get("type", "default")) or "default"
    if kind not in FREQUENCIES:
        raise PeftError(f"rope_type {kind!r} is not supported; supported: {', '.join(FREQUENCIES)}")
    return kind


def read_rope(
    given: Mapping[str, Any] | None, values: Mapping[str, Any], theta: float = 10000.0
) -> dict[str, Any]:
    """Hugging Face's rope settings, complete, in the present spelling or the older one.

    Args:
        given: the object `rope_parameters`, formerly `rope_scaling`, of a `config.json`.
        values: the `config.json`, which formerly held `rope_theta` beside it.
        theta: the family's base, where none is given.

    Raises:
        PeftError: for a `rope_type` that is not supported or lacks a number, or a partial rotation.
    """
    settings = {"rope_theta": values.get("rope_theta") or theta, **(given or {})}
    kind = rope_type(settings)
    if "original_max_position_embeddings" in NEEDED[kind]:
        trained = values.get("original_max_position_embeddings")
        trained = trained or settings.get("original_max_position_embeddings")
        settings["original_max_position_embeddings"] = trained or values.get("max_position_embeddings")
    for name in ("rope_theta", *NEEDED[kind]):
        if settings.get(name) is None:
            raise PeftError(f"rope_type {kind!r} needs {name}, which config.json does not give")
    partial_factor = settings.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial_factor not in (None, 1.0):
        raise PeftError(f"partial_rotary_factor {partial_factor} is not supported; supported: 1.0")
    return settings


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float64) / head_dim


def _default(
    head_dim: int, settings: Mapping[str, Any], max_positions: int, positions: Positions
) -> tuple[Frequencies, float]:
    return settings["rope_theta"] ** -_exponents(head_dim), 1.0


def _linear(
    head_dim: int, settings: Mapping[str, Any], max_positions: int, positions: Positions
) -> tuple[Frequencies, float]:
    """Positions divided by `factor`."""
    return settings["rope_theta"] ** -_exponents(head_dim) / settings["factor"], 1.0


def _dynamic(
    head_dim: int, settings: Mapping[str, Any], max_positions: int, positions: Positions
) -> tuple[Frequencies, float]:
    """A base for the present length n beyond the trained M: `theta (s n / M - s + 1) ** (H / (H - 2))`.

    This is what `transformers` computes in the first pass of a model; later passes there remember the
    longest input so far.
    """
    factor = settings["factor"]
    length = jnp.maximum(jnp.max(positions) + 1, max_positions)
    growth = factor * length / max_positions - (factor - 1)
    theta = settings["rope_theta"] * growth ** (head_dim / (head_dim - 2))
    return theta ** jnp.asarray(-_exponents(head_dim), jnp.float32), 1.0


def _llama3(
    head_dim: int, settings: Mapping[str, Any], max_positions: int, positions: Positions
) -> tuple[Frequencies, float]:
    """Long wavelengths divided by `factor`, short ones kept, a linear passage between."""
    frequencies = settings["rope_theta"] ** -_exponents(head_dim)
    turns = settings["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / settings["factor"]), 1.0


def _yarn(
    head_dim: int, settings: Mapping[str, Any], max_positions: int, positions: Positions
) -> tuple[Frequencies, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): a passage by dimension, and warmer attention."""
    frequencies = settings["rope_theta"] ** -_exponents(head_dim)
    original = settings["original_max_position_embeddings"]
    factor = settings.get("factor") or max_positions / original

    def dimension(turns: float) -> float:
        period = original / (turns * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(settings["rope_theta"]))

    low = dimension(settings.get("beta_fast") or 32)
    high = dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    passage = np.clip((np.arange(head_dim // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
    scaled = frequencies * (1.0 - passage + passage / factor)

    def warmth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    attention = settings.get("attention_factor")
    if attention is None:
        attention = warmth(mscale) / warmth(all_dim) if mscale and all_dim else warmth(1.0)
    return scaled, float(attention)


def _longrope(
    head_dim: int, settings: Mapping[str, Any], max_positions: int, positions: Positions
) -> tuple[Frequencies, float]:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor per pair, others beyond the trained length."""
    original = settings["original_max_position_embeddings"]
    frequencies = settings["rope_theta"] ** -_exponents(head_dim)
    for name in ("short_factor", "long_factor"):
        if len(settings[name]) != head_dim // 2:
            raise PeftError(
                f"{name} of rope_type 'longrope' has {len(settings[name])} numbers; "
                f"head_dim {head_dim} needs {head_dim // 2}"
            )
    short, long = (
        jnp.asarray(frequencies / np.asarray(settings[name]), jnp.float32)
        for name in ("short_factor", "long_factor")
    )
    attention = settings.get("attention_factor")
    if attention is None:
        factor = settings.get("factor") or max_positions / original
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return jnp.where(jnp.max(positions) + 1 > original, long, short), float(attention)


FREQUENCIES: dict[str, Callable[..., tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""By `rope_type`: `(head_dim, settings, max_positions, positions)` -> frequencies [H/2], factor of cos."""
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""The numbers that each `rope_type` cannot do without."""
