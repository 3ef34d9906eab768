"""The bottleneck that adapters are made of, and a block with one after or beside each of its branches.

    Δ(u) = s · (f(u W_down + b_down) W_up + b_up)      W_down [D, r], W_up [r, D]

`f` with dropout after it. A sequential one reads what its branch gives, `h + Δ(h)`; a parallel one what the
branch reads, `h + Δ(x)`, the residual stream before any norm. Backward keeps, per token, u (of a parallel one
in a pre-norm block it is kept anyway) and the r values before `f`; norms, scales and dropout add nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from peftjax.backbone import layers
from peftjax.backbone.context import Context
from peftjax.backbone.functional import layer_norm, linear, norm_init, uniform_init
from peftjax.backbone.layers import recompute
from peftjax.backbone.protocols import BlockModule
from peftjax.backbone.rewriting import BlockStack
from peftjax.backbone.rewritten import RewrittenBlock
from peftjax.core.checks import fraction, one_of, positive
from peftjax.methods._targets import key_for
from peftjax.weights.dropout import drop

Form = Literal["sequential", "parallel"]
Init = Literal["lora", "bert", "houlsby"]
Norm = Literal["none", "in", "out"]
Layer = Mapping[str, Any]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    **{name: layers.ACTIVATIONS[name] for name in ("relu", "gelu", "gelu_new", "silu", "tanh")},
}
BRANCHES = ("attention", "cross_attention", "feed_forward")
NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """One adapter's shape and form.

    Attributes:
        size: r.
        form: what it reads.
        scale: s.
        activation: f, a name in `ACTIVATIONS`.
        dropout: rate after f, when `run` is given a key.
        init_as: "lora": W_down ~ U(±1/√D), W_up = 0, so that the block is as it was; "bert": both
            N(0, 0.02²); "houlsby": both N(0, 0.01²) cut at two deviations. Biases are zero.
        norm: a layer norm of u ("in") or of Δ after its scale ("out"), or "none".
        learn_scale: whether s is trained, from the value given.
        bias: whether there are b_down and b_up.
    """

    size: int
    form: Form = "sequential"
    scale: float = 1.0
    activation: str = "relu"
    dropout: float = 0.0
    init_as: Init = "lora"
    norm: Norm = "none"
    learn_scale: bool = False
    bias: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for a setting out of range."""
        positive(caller, "the width of the bottleneck", self.size)
        fraction(caller, "dropout", self.dropout)
        one_of(caller, "activation", self.activation, ACTIVATIONS)
        one_of(caller, "init", self.init_as, get_args(Init))
        one_of(caller, "norm", self.norm, get_args(Norm))

    def init(self, key: Key[Array, ""], layers: int, width: int) -> dict[str, Any]:
        """`down` and `up` {kernel, bias}, as asked for `norm` {scale, bias} and `scale`, [layers, ...]."""
        down_key, up_key = jax.random.split(key)
        values: dict[str, Any] = {
            "down": self.start("down", down_key, (layers, width, self.size)),
            "up": self.start("up", up_key, (layers, self.size, width)),
        }
        if self.bias:
            values["down"]["bias"] = jnp.zeros((layers, self.size))
            values["up"]["bias"] = jnp.zeros((layers, width))
        if self.norm != "none":
            values["norm"] = norm_init((layers, width))
        if self.learn_scale:
            values["scale"] = jnp.full((layers,), self.scale, jnp.float32)
        return values

    def start(self, part: str, key: Key[Array, ""], shape: tuple[int, int, int]) -> dict[str, Array]:
        """What W_down or W_up of all layers is made of at the beginning."""
        if self.init_as == "lora":
            return {"kernel": uniform_init(key, shape) if part == "down" else jnp.zeros(shape)}
        if self.init_as == "bert":
            return {"kernel": 0.02 * jax.random.normal(key, shape)}
        return {"kernel": 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape)}

    def project(self, layer: Layer, part: str, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x W_down + b_down` or `x W_up + b_up`, in the dtype of x."""
        return linear(layer[part], x)

    def run(
        self, layer: Layer, u: Float[Array, "... D"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "... D"]:
        """Δ(u), in the dtype of u."""

        # Recomputed, so that no copy of a kernel in another dtype is kept, nor a mask, nor a normed array.
        @recompute
        def down(layer: Layer, u: Array) -> Array:
            return self.project(layer, "down", self._normed(layer, u) if self.norm == "in" else u)

        @recompute
        def up(layer: Layer, inner: Array, key: Key[Array, ""] | None) -> Array:
            active = ACTIVATIONS[self.activation](inner)
            if key is not None and self.dropout:
                active = drop(active, self.dropout, key)
            scale = layer["scale"].astype(u.dtype) if self.learn_scale else self.scale
            out = scale * self.project(layer, "up", active)
            return self._normed(layer, out) if self.norm == "out" else out

        return up(layer, down(layer, u), key)

    def _normed(self, layer: Layer, x: Array) -> Array:
        return layer_norm(layer["norm"], x, NORM_EPSILON).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Bottlenecks in the branches of every block.

    Attributes:
        attention: of the attention, and another one of the cross-attention of a block that has it, or None.
        feed_forward: of the feed-forward, or None.
        in_cross_attention: whether cross-attention has one.
    """

    attention: Bottleneck | None = None
    feed_forward: Bottleneck | None = None
    in_cross_attention: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for a setting out of range."""
        for bottleneck in (self.attention, self.feed_forward):
            if bottleneck is not None:
                bottleneck.require_valid(caller)

    def init(self, key: Key[Array, ""], stack: BlockStack) -> dict[str, Any]:
        """A bottleneck's parameters by its branch."""
        trained = {}
        for branch in (*stack.attentions, "feed_forward"):
            if (bottleneck := self.of(branch)) is not None:
                own_key = key_for(key, f"{stack.name}/{branch}")
                trained[branch] = bottleneck.init(own_key, len(stack.layers), stack.width)
        return trained

    def added(self, trained: Layer, stack: BlockStack, key: Key[Array, ""] | None) -> dict[str, Any]:
        """The same."""
        return {branch: trained[branch] for branch in BRANCHES if branch in trained}

    def rewrite(self, block: BlockModule, name: str) -> RewrittenBlock:
        """The block with them."""
        return AdapterBlock(block, name, self)

    def of(self, branch: str) -> Bottleneck | None:
        """The bottleneck of a branch, or None."""
        if branch == "cross_attention" and not self.in_cross_attention:
            return None
        return self.feed_forward if branch == "feed_forward" else self.attention


@dataclasses.dataclass(frozen=True)
class AdapterBlock(RewrittenBlock):
    """A block with bottlenecks, whose parameters are `added[branch]`; `added["key"]` draws their dropout.

    Attributes:
        adapters: which, and where.
    """

    adapters: Adapters

    def attention_branch(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """What attention adds to the stream, adapted."""
        return self._adapted("attention", hidden, self.inner.attention_branch(hidden, context))

    def cross_attention_branch(
        self, hidden: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B T D"]:
        """What cross-attention adds to the stream, adapted."""
        return self._adapted("cross_attention", hidden, self.inner.cross_attention_branch(hidden, context))

    def feed_forward_branch(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What the feed-forward adds to the stream, adapted."""
        return self._adapted("feed_forward", hidden, self.inner.feed_forward_branch(hidden))

    def _adapted(self, branch: str, hidden: Array, update: Array) -> Array:
        bottleneck = self.adapters.of(branch)
        if bottleneck is None:
            return update
        key = self.added.get("key")
        key = None if key is None else jax.random.fold_in(key, BRANCHES.index(branch))
        read = update if bottleneck.form == "sequential" else hidden
        return update + bottleneck.run(self.added[branch], read, key)
