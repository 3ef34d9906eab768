"""A transformer block with something changed: the base of the blocks that methods make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from peftjax.backbone.context import Context


@dataclasses.dataclass(frozen=True)
class RewrittenBlock:
    """`inner` with its own parameters and branches, of which a subclass overrides some.

    It stands where a Linen block does: `apply` runs the same methods with the same variables, caches and
    rngs. In a method `inner` is bound, so that `self.inner.attention_branch(...)` is the branch as it was,
    and what the method added to the parameters is `self.added`. A rewritten block can be rewritten again.

    Attributes:
        inner: a block, or a rewritten one.
        added_as: the name of the method's parameters beside the block's own.
    """

    inner: Any
    added_as: str

    def apply(
        self, variables: Any, *inputs: Any, method: str | Callable[..., Any] | None = None, **options: Any
    ) -> Any:
        """As of a Linen module."""

        def call(inner: Any, *inputs: Any) -> Any:
            bound = dataclasses.replace(self, inner=inner)
            run = method if callable(method) else getattr(type(bound), method or "__call__")
            return run(bound, *inputs)

        return self.inner.apply(variables, *inputs, method=call, **options)

    def clone(self, **changes: Any) -> RewrittenBlock:
        """The same changes to a block of another `config` or `dtype`."""
        return dataclasses.replace(self, inner=self.inner.clone(**changes))

    def lazy_init(self, *inputs: Any) -> Any:
        """The variables of the block as it was."""
        return self.inner.lazy_init(*inputs)

    def get_variable(self, collection: str, name: str) -> Any:
        """As of a Linen module, in a method."""
        return self.inner.get_variable(collection, name)

    def has_rng(self, name: str) -> bool:
        """As of a Linen module, in a method."""
        return self.inner.has_rng(name)

    def make_rng(self, name: str) -> Array:
        """As of a Linen module, in a method."""
        return self.inner.make_rng(name)

    @property
    def config(self) -> Any:
        """The settings of the block."""
        return self.inner.config

    @property
    def dtype(self) -> Any:
        """The compute dtype."""
        return self.inner.dtype

    @property
    def added(self) -> Any:
        """The parameters of one layer that the method added, in a method."""
        return self.get_variable("params", self.added_as)

    def __call__(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """Run the residual branches."""
        return self.feed_forward_sublayer(self.attention_sublayer(hidden, context))

    def attention_sublayer(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """The stream after attention, and after cross-attention where there is one."""
        hidden = self.attention_join(hidden, self.attention_branch(hidden, context))
        if self.config.cross_attention:
            hidden = self.cross_attention_join(hidden, self.cross_attention_branch(hidden, context))
        return hidden

    def feed_forward_sublayer(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The stream after the feed-forward."""
        return self.feed_forward_join(hidden, self.feed_forward_branch(hidden))

    def attention_branch(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """What attention adds to the stream."""
        return self.inner.attention_branch(hidden, context)

    def attention_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream with what attention adds."""
        return self.inner.attention_join(hidden, update)

    def cross_attention_branch(
        self, hidden: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B T D"]:
        """What cross-attention adds to the stream."""
        return self.inner.cross_attention_branch(hidden, context)

    def cross_attention_join(
        self, hidden: Float[Array, "B T D"], update: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The stream with what cross-attention adds."""
        return self.inner.cross_attention_join(hidden, update)

    def feed_forward_branch(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What the feed-forward adds to the stream."""
        return self.inner.feed_forward_branch(hidden)

    def feed_forward_join(
        self, hidden: Float[Array, "B S D"], update: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The stream with what the feed-forward adds."""
        return self.inner.feed_forward_join(hidden, update)
