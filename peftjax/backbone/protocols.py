"""What a backbone asks of its modules, and so what a method that rewrites one may rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.context import Context

Params = dict[str, Any]
Batch = Mapping[str, Any]
Cache = Any
"""Keys and values of the tokens so far, as the stack that made it lays them out; of `Scan`, leaves
[num_layers, B, ...] by the names of a block's parts."""
DropoutKey = Key[Array, ""] | None


class Module(Protocol):
    """An embedding, a block or a head: a Linen module, or what a method puts around one."""

    def apply(
        self, variables: Any, *inputs: Any, method: str | Callable[..., Any] | None = None, **options: Any
    ) -> Any:
        """Run a method of the module, by default `__call__`, with these variables."""
        ...

    def clone(self, **changes: Any) -> Self:
        """The module with other settings, such as `dtype`."""
        ...

    def lazy_init(self, key: Key[Array, ""], *inputs: Any) -> Any:
        """Random variables, from the shapes of inputs."""
        ...


class BlockModule(Module, Protocol):
    """A transformer block: residual branches, each of which is read and joined to the stream apart.

    In a block with `config.cross_attention`, between the two branches here there is a third, of the same
    methods, named `cross_attention`.
    """

    @property
    def config(self) -> BlockConfig:
        """The settings of the family."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """The compute dtype."""
        ...

    def attention_branch(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """What attention adds to the stream."""
        ...

    def attention_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream with what attention adds."""
        ...

    def cross_attention_branch(
        self, hidden: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B T D"]:
        """What cross-attention adds to the stream."""
        ...

    def cross_attention_join(
        self, hidden: Float[Array, "B T D"], update: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The stream with what cross-attention adds."""
        ...

    def feed_forward_branch(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What the feed-forward adds to the stream."""
        ...

    def feed_forward_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream with what the feed-forward adds."""
        ...


class Sublayers:
    """The order in which a block runs its branches, of a family's block and of one that a method changed."""

    def __call__(self: Any, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """Run the residual branches."""
        return self.feed_forward_sublayer(self.attention_sublayer(hidden, context))

    def attention_sublayer(
        self: BlockModule, hidden: Float[Array, "B S D"], context: Context
    ) -> Float[Array, "B S D"]:
        """The stream after attention, and after cross-attention where there is one."""
        hidden = self.attention_join(hidden, self.attention_branch(hidden, context))
        if self.config.cross_attention:
            hidden = self.cross_attention_join(hidden, self.cross_attention_branch(hidden, context))
        return hidden

    def feed_forward_sublayer(self: BlockModule, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The stream after the feed-forward."""
        return self.feed_forward_join(hidden, self.feed_forward_branch(hidden))
