"""A changed weight in the format of its quantized base, and what that rounds away."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.weights.base import Weight
from peftjax.weights.coding import coded_weight
from peftjax.weights.quantized import Quantized


@partial(jax.tree_util.register_dataclass, data_fields=["of_weight", "of_change"], meta_fields=[])
@dataclass(frozen=True)
class RoundingError:
    """What coding a merged weight W in the format of its base `W0` rounded away, `E = W - decode(encode(W))`.

    Attributes:
        of_weight: `|E| / |W|` in the Frobenius norm.
        of_change: `|E| / |W - W0|`: from 1 on, more than the adapter had changed. Infinite without a change.
    """

    of_weight: Float[Array, ""]
    of_change: Float[Array, ""]


def coded_base(w: Any) -> Quantized | None:
    """The quantized weight that a structured one changes; None where there is none, or no change."""
    if isinstance(w, Quantized):
        return None
    while isinstance(w, Weight) and not isinstance(w, Quantized):
        w = w.base
    return w if isinstance(w, Quantized) else None


def requantized(w: Weight, base: Quantized) -> tuple[Quantized, RoundingError]:
    """A changed weight as codes of its base's format, made of float32.

    Args:
        w: the changed weight.
        base: what it changes, see `coded_base`.
    """
    whole = w.cast(jnp.float32).dense()
    coded = coded_weight(whole, base.layout, base.codes.format)
    rounded = jnp.linalg.norm((whole - coded.dense()).ravel())
    change = jnp.linalg.norm((whole - base.cast(jnp.float32).dense()).ravel())
    error = RoundingError(rounded / jnp.linalg.norm(whole.ravel()), rounded / change)
    codes = replace(coded.codes, dtype=base.codes.dtype)
    return replace(coded, codes=codes, of_dtype=base.of_dtype), error
