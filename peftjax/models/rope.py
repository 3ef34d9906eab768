"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the ways its frequencies are scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peftjax.errors import PeftError

Rotation = tuple[Float[Array, "#B S h"], Float[Array, "#B S h"]]
"""Cosine and sine of every position's angles, in float32; h is half of a head's width."""


def rotate(x: Float[Array, "B S N H"], rotation: Rotation) -> Float[Array, "B S N H"]:
    """Turn the pairs `(x[i], x[i + H/2])` by their position's angles; computed in float32."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rotation(
    positions: Int[Array, "#B S"], head_dim: int, settings: Mapping[str, Any], max_positions: int
) -> Rotation:
    """Cosines and sines for `positions` under a checkpoint's rope settings.

    `angle[p, i] = p f_i` with `f_i = theta ** (-2 i / H)` after the scaling that `settings` names.

    Args:
        positions: of every token.
        head_dim: H, even.
        settings: Hugging Face's `rope_parameters`: `rope_theta`, `rope_type` and that type's own.
        max_positions: the checkpoint's `max_position_embeddings`.

    Raises:
        PeftError: for a `rope_type` that is not in `FREQUENCIES`.
    """
    kind = rope_type(settings)
    frequencies, factor = FREQUENCIES[kind](head_dim, settings, max_positions)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rope_type(settings: Mapping[str, Any]) -> str:
    """The name of the scaling, "default" when there is none.

    Raises:
        PeftError: for a name that is not in `FREQUENCIES`.
    """
    kind = settings.get("rope_type", settings.get("type", "default")) or "default"
    if kind not in FREQUENCIES:
        raise PeftError(f"rope_type {kind!r} is not supported; supported: {', '.join(FREQUENCIES)}")
    return kind


def _default(head_dim: int, settings: Mapping[str, Any], _: int) -> tuple[np.ndarray, float]:
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return settings["rope_theta"] ** -exponents, 1.0


def _linear(head_dim: int, settings: Mapping[str, Any], positions: int) -> tuple[np.ndarray, float]:
    """Positions divided by `factor`."""
    return _default(head_dim, settings, positions)[0] / settings["factor"], 1.0


def _llama3(head_dim: int, settings: Mapping[str, Any], positions: int) -> tuple[np.ndarray, float]:
    """Long wavelengths divided by `factor`, short ones kept, a linear passage between."""
    frequencies, _ = _default(head_dim, settings, positions)
    turns = settings["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / settings["factor"]), 1.0


def _yarn(head_dim: int, settings: Mapping[str, Any], positions: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): a passage by dimension, and warmer attention."""
    frequencies, _ = _default(head_dim, settings, positions)
    original = settings.get("original_max_position_embeddings") or positions
    factor = settings.get("factor") or positions / original

    def dimension(turns: float) -> float:
        period = original / (turns * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(settings["rope_theta"]))

    low = dimension(settings.get("beta_fast") or 32)
    high = dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    passage = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    scaled = frequencies * (1.0 - passage + passage / factor)

    def warmth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    attention = settings.get("attention_factor")
    if attention is None:
        attention = warmth(mscale) / warmth(all_dim) if mscale and all_dim else warmth(1.0)
    return scaled, float(attention)


FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
"""By `rope_type`: `(head_dim, settings, max_positions) -> (frequencies [H/2], factor of cos and sin)`."""
