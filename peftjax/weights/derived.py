"""A low-rank weight whose factors are formed in its layer, from numbers of its own and of the whole model."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from peftjax.weights.base import Weight, cast, contract
from peftjax.weights.contraction import Contraction
from peftjax.weights.fields import Slots, logical, random_key, shared, stacked, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank, Product
from peftjax.weights.stack_members import over_stack
from peftjax.weights.views import WholeMatrices

Factors = Callable[..., tuple[Array, Array]]
"""`(shared, slots of one matrix) -> (a [r, in], b [r, out])`; static, so hashable. `Drawn` gives keys."""


THIN = "thin"
"""The name of `x·aᵀ`, which is kept of a product that is recomputed."""


@structured
class Named(LowRank):
    """A low-rank weight whose `x·aᵀ` has a name."""

    def _enter(self, product: Product, x: Array, first: Array) -> Array:
        return checkpoint_name(super()._enter(product, x, first), THIN)


@structured
class Derived(WholeMatrices, Weight):
    """`w = base + scale · aᵀb` with `a, b = factors(shared, slots)`: as `LowRank`, of factors made anew.

    The backward pass keeps the thin `x·aᵀ` and makes the factors again, so that no layer holds its own. It
    keeps x only where a gradient goes into `a`.

    Attributes:
        base: the array or weight beside it.
        slots: numbers of each matrix, arrays `[*stack, ...]`.
        shared: numbers that all matrices use.
        layout: of the logical axes.
        factors: the factors of one matrix.
        scale: of the product.
        dropout: on the adapter's input.
        key: for the dropout.
    """

    base: Any = logical()
    slots: Slots = stacked()
    shared: Slots = shared()
    layout: Layout = static()
    factors: Factors = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    key: Array | None = random_key(default=None)

    def formed(self) -> LowRank:
        """The same weight with its factors."""

        def of_one(slots: Slots) -> tuple[Array, Array]:
            return self.factors(self.shared, slots)

        a, b = over_stack(of_one, len(self.layout.stack))(self.slots)
        return Named(self.base, a, b, self.layout, self.scale, self.dropout, self.key)

    def dense(self) -> Array:
        """The sum, in the base's dtype."""
        return self.formed().dense()

    def supports(self, rule: Contraction) -> bool:
        """What the low-rank weight supports."""
        return jax.eval_shape(lambda w: w.formed(), self).supports(rule)

    def cast(self, dtype: Any) -> "Derived":
        """The base in another dtype; the numbers stay as exact as they are."""
        return replace(self, base=cast(self.base, dtype))

    def slice_features(self, position: int, cut: range) -> Any:
        """A slice of the formed weight."""
        return self.formed().slice_features(position, cut)

    def _contract(self, x: Array, rule: Contraction) -> Array:
        @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(THIN))
        def product(x: Array, w: Derived) -> Array:
            return contract(x, w.formed(), rule)

        return product(x, self)


@structured
class Drawn(Derived):
    """A derived weight of which a factor is drawn anew where it has a key: `factors(shared, slots, key)`."""

    def formed(self) -> LowRank:
        """The same weight with its factors; without a key, those that nothing is added to."""

        def of_one(slots: Slots, key: Array | None) -> tuple[Array, Array]:
            return self.factors(self.shared, slots, key)

        a, b = over_stack(of_one, len(self.layout.stack))(self.slots, self.key)
        return Named(self.base, a, b, self.layout, self.scale, self.dropout, self.key)
