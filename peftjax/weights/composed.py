"""Base of the weights whose axes are not those of their parts."""

from collections.abc import Callable
from typing import Any, Self

from jax import Array

from peftjax.weights.base import Weight


class Composed(Weight):
    """A weight made of others with other axes, so that a sharding of its own axes applies to none of them."""

    def on_base(self, fn: Callable[[Any], Any]) -> Self:
        """The weight itself."""
        return self

    def part_specs(self, spec: Any) -> None:
        """None: the shards of the whole are no shards of its parts."""
        return None

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> None:
        """None: the shards of a part do not lie together."""
        return None
