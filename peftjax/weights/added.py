"""A weight plus a matrix that is formed in its layer, and has no form in activation space."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.weights.base import Weight, cast, contract, dense, lazily_merged
from peftjax.weights.canonical import to_canonical, to_logical
from peftjax.weights.contraction import Contraction, Gather
from peftjax.weights.dropout import drop, key_for_input
from peftjax.weights.fields import Slots, logical, random_key, shared, stacked, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.sharding import like, whole
from peftjax.weights.stack_members import over_stack
from peftjax.weights.views import WholeMatrices

Change = Callable[..., Array]
"""`slots of one matrix -> [in, out]`, or `(slots, base [in, out])` of one `of_base`; static, so hashable.

The slots that all matrices share are among them.
"""


@structured
class Added(WholeMatrices, Weight):
    """`w = base + change(slots)`, or `base + change(slots, base)`, a matrix formed in float32 in its layer.

    Where the base is a plain float32 array and no dropout acts, there is one product, with the sum; else two,
    `x·base + drop(x)·change`: a sum in 16 bits would round small changes away, and a quantized base keeps its
    own rule. Backward keeps x and the slots, and recomputes the change and the mask.

    Attributes:
        base: the array or weight that is changed.
        slots: the change's numbers, arrays `[*stack, ...]`.
        layout: of the logical axes.
        change: the change of one matrix.
        of_base: whether it depends on the base.
        dropout: on what meets the change.
        key: for the dropout.
        shared: numbers of the change that all matrices use.
    """

    base: Any = logical()
    slots: Slots = stacked()
    layout: Layout = static()
    change: Change = static()
    of_base: bool = static(default=False)
    dropout: float = static(default=0.0)
    key: Array | None = random_key(default=None)
    shared: Slots | None = shared(default=None)

    def delta(self) -> Array:
        """The change in the logical shape, float32."""
        given = (
            (to_canonical(whole(dense(self.base)), self.layout).astype(jnp.float32),) if self.of_base else ()
        )

        def of_one(slots: Slots, *given: Array) -> Array:
            return self.change({**(self.shared or {}), **slots}, *given)

        return to_logical(over_stack(of_one, len(self.layout.stack))(self.slots, *given), self.layout)

    def dense(self) -> Array:
        """The sum, taken in float32, in the base's dtype."""
        base = dense(self.base)
        return (base.astype(jnp.float32) + like(self.delta(), base)).astype(self.dtype)

    def supports(self, rule: Contraction) -> bool:
        """Whatever the base supports."""
        return not isinstance(self.base, Weight) or self.base.supports(rule)

    def cast(self, dtype: Any) -> "Added":
        """The base in another dtype; the slots stay as exact as they are."""
        return replace(self, base=cast(self.base, dtype))

    def _contract(self, x: Array, rule: Contraction) -> Array:
        return contract_added(x, self, rule)


def contract_added(x: Array, w: Any, rule: Contraction) -> Array:
    """X with `base + delta()`: in one product where the sum is exact and nothing drops, else in two.

    Args:
        x: the activation.
        w: a weight with `base`, `delta()`, `dropout` and `key`.
        rule: how they meet.
    """
    # A lookup has no input to drop.
    drops = w.key is not None and w.dropout > 0.0 and not isinstance(rule, Gather)
    key = key_for_input(w.key, x) if drops else None
    exact = not isinstance(w.base, Weight) and jnp.finfo(w.dtype).bits >= 32
    if exact and key is None:
        return lazily_merged(rule, x, w)
    of_product = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else w.dtype

    @jax.checkpoint
    def branch(x: Array, w: Any, key: Array | None) -> Array:
        x = x if key is None else drop(x, w.dropout, key)
        return rule(x, w.delta().astype(of_product))

    y = contract(x, w.base, rule)
    return y + like(branch(x, replace(w, key=None), key).astype(y.dtype), y)
