"""What stands before and after a `Ladder`: embeddings with a table of its own, the head of an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class BothStates:
    """The head of an encoder whose last states come with those of its side network.

    Attributes:
        inner: the head of the backbone's states.
        dropout: whether it drops out.
    """

    inner: Any
    dropout: bool

    def apply(self, variables: Any, states: Mapping[str, Array], *inputs: Any, rngs: Any = None) -> Any:
        """The backbone's states through the head, and the side network's as they are."""
        rngs = rngs if self.dropout else {}
        backbone = self.inner.apply(variables, states["backbone"], *inputs, rngs=rngs)
        return {**states, "backbone": jax.lax.stop_gradient(backbone)}

    def clone(self, **changes: Any) -> BothStates:
        """The same changes to the head."""
        return dataclasses.replace(self, inner=self.inner.clone(**changes))

    def lazy_init(self, *inputs: Any) -> Any:
        """The variables of the head."""
        return self.inner.lazy_init(*inputs)


@dataclasses.dataclass(frozen=True)
class SideEmbed:
    """The embeddings of a backbone, and what the side network's blocks share of its own.

    That is a bias of relative positions by the table `params[name]`, which stands in the place of the
    backbone's where both are computed by the one module. Compiled, the second lookup of words is none.

    Attributes:
        inner: the embeddings.
        name: of the method.
        dropout: whether they drop out.
    """

    inner: Any
    name: str
    dropout: bool

    def apply(self, variables: Any, batch: Any, *, rngs: Any = None) -> Any:
        """As of a Linen module."""
        params = {name: own for name, own in variables["params"].items() if name != self.name}
        rngs = rngs if self.dropout else {}
        hidden, context = self.inner.apply({"params": params}, batch, rngs=rngs)
        if self.name in variables["params"]:
            own = {**params, **variables["params"][self.name]}
            again = self.inner.apply({"params": own}, batch)[1]
            context = dataclasses.replace(context, side_bias=again.bias)
        return hidden, context

    def clone(self, **changes: Any) -> SideEmbed:
        """The same changes to the embeddings."""
        return dataclasses.replace(self, inner=self.inner.clone(**changes))

    def lazy_init(self, *inputs: Any) -> Any:
        """The variables of the embeddings."""
        return self.inner.lazy_init(*inputs)
