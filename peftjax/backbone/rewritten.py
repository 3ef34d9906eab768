"""Modules of a backbone with something changed: the bases of the blocks, embeddings and heads of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

from peftjax.backbone.protocols import BlockModule, Module, Sublayers


@dataclasses.dataclass(frozen=True)
class RewrittenModule:
    """It takes the place of a Linen module and has that module's parameters and settings.

    Attributes:
        inner: the module as it was.
    """

    inner: Module

    def clone(self, **changes: Any) -> Self:
        """The same rewrite of a module with other settings."""
        return dataclasses.replace(self, inner=self.inner.clone(**changes))

    def lazy_init(self, *inputs: Any) -> Any:
        """The variables of the module as it was."""
        return self.inner.lazy_init(*inputs)


@dataclasses.dataclass(frozen=True)
class RewrittenBlock(Sublayers, RewrittenModule):
    """A block with its own parameters and branches, of which a subclass overrides some.

    `apply` runs the same methods with the same variables, caches and rngs as a Linen block's. In a method
    `inner` is bound, so that `self.inner.attention_branch(...)` is the branch as it was, and what the method
    added to the parameters is `self.added`. What is not overridden is `inner`'s, whose `config`, `dtype`
    and rngs it has too. A rewritten block can itself be rewritten.

    Attributes:
        inner: a block, or a rewritten one.
        added_as: the name of the method's parameters beside the block's own.
    """

    inner: BlockModule
    added_as: str

    def apply(
        self, variables: Any, *inputs: Any, method: str | Callable[..., Any] | None = None, **options: Any
    ) -> Any:
        """As of a Linen module."""

        def call(inner: Any, *inputs: Any) -> Any:
            bound = dataclasses.replace(self, inner=inner)
            if callable(method):
                return method(bound, *inputs)
            return getattr(bound, method or "__call__")(*inputs)

        return self.inner.apply(variables, *inputs, method=call, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("inner", "added_as"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def added(self) -> Any:
        """The parameters of one layer that the method added, in a method."""
        return self.get_variable("params", self.added_as)
