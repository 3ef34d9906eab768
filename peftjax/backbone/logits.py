"""The outputs of a language model, not yet projected to the vocabulary: `[B, S, V]` is never stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peftjax.weights.base import cast, contract
from peftjax.weights.contraction import Dot


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logits:
    """`c(hidden · kernel + bias)` with `c(x) = softcap tanh(x / softcap)`, computed where it is read.

    A loss of `peftjax.losses` reads it part by part. `dense()`, or any `jnp` function, makes the array.

    Attributes:
        hidden: [B, S, D], the states that the output layer reads.
        kernel: [D, V], or [V, D] with `tied`; an array or a structured weight.
        bias: [V], or None.
        softcap: bound of the logits, or None.
        tied: whether the kernel is an embedding table, read without a transposed copy.
        devices: over how many devices rows and tokens are divided: a loss computes as many parts at a time.
        token_devices: over how many of them the tokens of a row are.
    """

    hidden: Float[Array, "*B D"]
    kernel: Any
    bias: Float[Array, " V"] | None = None
    softcap: float | None = field(default=None, metadata={"static": True})
    tied: bool = field(default=False, metadata={"static": True})
    devices: int = field(default=1, metadata={"static": True})
    token_devices: int = field(default=1, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, S, V]."""
        return (*self.hidden.shape[:-1], self.kernel.shape[0 if self.tied else 1])

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return self.hidden.dtype

    def at(self, index: Int[Array, " B"]) -> Logits:
        """The logits of one position a row: [B, 1, V]."""
        chosen = jnp.take_along_axis(self.hidden, index[:, None, None], axis=1)
        return replace(self, hidden=chosen)

    def dense(self) -> Float[Array, "*B V"]:
        """The array of logits, in the compute dtype."""
        rule = Dot(x_contract=(self.ndim - 1,), w_contract=(1 if self.tied else 0,))
        logits = contract(self.hidden, cast(self.kernel, self.dtype), rule)
        if self.bias is not None:
            logits = logits + self.bias.astype(logits.dtype)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return logits

    def __jax_array__(self) -> Array:
        return self.dense()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dense(), dtype)
