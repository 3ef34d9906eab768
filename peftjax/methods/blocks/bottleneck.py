"""The bottleneck that adapters are made of, and a block with one after or beside each of its branches.

    Δ(u) = s · (f(u W_down + b_down) W_up + b_up)      W_down [D, r], W_up [r, D]

`f` with dropout after it. A sequential one reads what its branch gives, `h + Δ(h)`; a parallel one what the
branch reads, `h + Δ(x)`, the residual stream before any norm. Backward keeps, per token, u (of a parallel one
the stream, which the block keeps anyway) and the r values before `f`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from peftjax.errors import PeftError
from peftjax.methods.blocks.rewritten import Context, RewrittenBlock

Form = Literal["sequential", "parallel"]
Layer = Mapping[str, Any]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """One adapter's shape and form.

    Attributes:
        size: r.
        form: what it reads.
        scale: s.
        activation: f, a name in `ACTIVATIONS`.
        dropout: rate after f, when `run` is given a key.
    """

    size: int
    form: Form = "sequential"
    scale: float = 1.0
    activation: str = "relu"
    dropout: float = 0.0

    def require_valid(self, who: str) -> None:
        """Raise a PeftError for a setting out of range."""
        if self.size < 1:
            raise PeftError(f"{who}: the bottleneck must be 1 wide or more, got {self.size}")
        if self.form not in ("sequential", "parallel"):
            raise PeftError(f"{who}: form {self.form!r} is not 'sequential' or 'parallel'")
        if self.activation not in ACTIVATIONS:
            raise PeftError(f"{who}: activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise PeftError(f"{who}: dropout must be in [0, 1), got {self.dropout}")

    def init(
        self, key: Key[Array, ""], stack: tuple[int, ...], width: int, std: float | None = None
    ) -> dict[str, dict[str, Array]]:
        """`{"down": {"kernel", "bias"}, "up": ...}`, each with the axes `stack` first, float32.

        With `std` both kernels are drawn from N(0, std²); without, W_down ~ U(±1/√D) and W_up = 0, so
        that the block is as it was. Biases are zero.
        """
        down_key, up_key = jax.random.split(key)
        down, up = (*stack, width, self.size), (*stack, self.size, width)
        if std is None:
            bound = width**-0.5
            kernels = jax.random.uniform(down_key, down, minval=-bound, maxval=bound), jnp.zeros(up)
        else:
            kernels = std * jax.random.normal(down_key, down), std * jax.random.normal(up_key, up)
        return {
            "down": {"kernel": kernels[0], "bias": jnp.zeros((*stack, self.size))},
            "up": {"kernel": kernels[1], "bias": jnp.zeros((*stack, width))},
        }

    def run(
        self, layer: Layer, u: Float[Array, "... D"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "... D"]:
        """Δ(u), in the dtype of u."""
        # Recomputed, so that no copy of a kernel in another dtype is kept, nor a mask.
        recompute = functools.partial(jax.checkpoint, prevent_cse=False)

        @recompute
        def down(part: Layer, u: Array) -> Array:
            return u @ part["kernel"].astype(u.dtype) + part["bias"].astype(u.dtype)

        @recompute
        def up(part: Layer, inner: Array, key: Key[Array, ""] | None) -> Array:
            active = ACTIVATIONS[self.activation](inner)
            if key is not None and self.dropout:
                keep = jax.random.bernoulli(key, 1.0 - self.dropout, active.shape)
                active = jnp.where(keep, active / (1.0 - self.dropout), 0)
            out = active @ part["kernel"].astype(u.dtype) + part["bias"].astype(u.dtype)
            return self.scale * out

        return up(layer["up"], down(layer["down"], u), key)


@dataclasses.dataclass(frozen=True)
class AdapterBlock(RewrittenBlock):
    """A block with bottlenecks, whose parameters are `added["attention"]` and `added["feed_forward"]`.

    `added["key"]`, where it is given, draws the dropout.

    Attributes:
        attention: of the attention branch, or None.
        feed_forward: of the feed-forward branch, or None.
    """

    attention: Bottleneck | None = None
    feed_forward: Bottleneck | None = None

    def attention_branch(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """What attention adds to the stream, adapted."""
        return self._adapted("attention", hidden, self.inner.attention_branch(hidden, context))

    def feed_forward_branch(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What the feed-forward adds to the stream, adapted."""
        return self._adapted("feed_forward", hidden, self.inner.feed_forward_branch(hidden))

    def _adapted(self, branch: str, hidden: Array, update: Array) -> Array:
        bottleneck = getattr(self, branch)
        if bottleneck is None:
            return update
        key = self.added.get("key")
        key = None if key is None else jax.random.fold_in(key, branch == "feed_forward")
        read = update if bottleneck.form == "sequential" else hidden
        return update + bottleneck.run(self.added[branch], read, key)
