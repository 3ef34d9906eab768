"""Weights mixed by a router before they are used: `Σ_e c_e w_e`, which no product ever forms."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.errors import PeftError
from peftjax.core.shapes import match_sizes
from peftjax.weights.base import Weight, dense
from peftjax.weights.composed import Composed
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather
from peftjax.weights.fields import logical, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.stack_members import contract_summed, over_members, supports_summed, true_of_member


@structured
class Mixture(Composed):
    """`w[n, ...] = Σ_e coefficients[n, e] · base[e, ...]`, for each place n of the router's own axes, if any.

    A product weighs x and then meets all experts: `Σ_e (c_e x)·w_e`. Backward keeps x, the coefficients and
    the parts of the experts.

    Fields:
        base: a weight with the stack of the experts first, then the axes of this weight that are not new.
        coefficients: `[*new axes, E]`.
        new: for each axis of this weight, whether it is one of the coefficients.
    """

    base: Weight = logical()
    coefficients: Array = logical()
    layout: Layout = static()
    new: tuple[bool, ...] = static()

    @property
    def dtype(self) -> jnp.dtype:
        """That of the experts."""
        return self.base.dtype

    @property
    def read_as(self) -> str:
        """The axes of the experts before they were mixed, the experts' own first."""
        return self.base.layout.letters

    def dense(self) -> Array:
        """The mixed array."""
        mixed = jnp.tensordot(self.coefficients, dense(self.base), 1)
        added = iter(range(sum(self.new)))
        own = iter(range(sum(self.new), self.ndim))
        return lax.transpose(mixed, [next(added if new else own) for new in self.new]).astype(self.dtype)

    def supports(self, rule: Contraction) -> bool:
        """Products in which x meets axes of the experts; of one mixture, what each expert supports."""
        if isinstance(rule, Dot):
            if any(self.new[p] for p in rule.w_contract) or rule.out_sharding is not None:
                return False
            return supports_summed(self.base, self._of_experts(rule, 0)[0])
        if any(self.new) or not isinstance(rule, Conv | Gather):
            return False
        return true_of_member(lambda one: one.supports(rule), self.base, 0)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The experts' product with the weighed x, summed over them."""
        inner, labels = self._of_experts(rule, x.ndim)
        batched = dict(zip(rule.w_batch, rule.x_batch))
        added = [p for p, new in enumerate(self.new) if new]
        free = [p for p in added if p not in batched]
        # The axes of the weighed x: those of x, new ones that x has not, the experts.
        at = [batched.get(p, x.ndim + free.index(p) if p in free else 0) for p in added]
        ndim = x.ndim + len(free) + 1

        @jax.checkpoint
        def product(x: Array, coefficients: Array, base: Weight) -> Array:
            places = (*at, ndim - 1)
            coefficients = lax.transpose(coefficients, sorted(range(len(places)), key=places.__getitem__))
            coefficients = lax.expand_dims(coefficients, [n for n in range(ndim) if n not in places])
            x = lax.expand_dims(x, range(x.ndim, ndim))
            return contract_summed((x * coefficients).astype(x.dtype), base, inner)

        y = product(x, self.coefficients, self.base)
        found, wanted = labels
        return lax.transpose(y, [found.index(label) for label in wanted])

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The experts' rows, weighed and summed."""
        return self._summed(lambda one, c: c * one.gather(indices, rule))

    def conv(self, x: Array, rule: Conv) -> Array:
        """The experts' convolutions of the weighed x, summed."""
        return self._summed(lambda one, c: one.conv((c * x).astype(x.dtype), rule))

    def _summed(self, fn: Callable[[Weight, Array], Array]) -> Array:
        @jax.checkpoint
        def summed(coefficients: Array, base: Weight) -> Array:
            found = over_members(fn, base, 0, coefficients, axes=(0,))
            return found.sum(0).astype(self.dtype)

        return summed(self.coefficients, self.base)

    def _of_experts(self, rule: Dot, x_ndim: int) -> tuple[Dot, tuple[list[Any], list[Any]]]:
        """The rule of the experts' product, and its result's axes as they come and as they are wanted."""
        batched = dict(zip(rule.w_batch, rule.x_batch))
        free = [p for p, new in enumerate(self.new) if new and p not in batched]
        shared = [p for p in rule.w_batch if not self.new[p]]
        inner = Dot(
            x_contract=(*rule.x_contract, x_ndim + len(free)),
            w_contract=(*(self._of_base(p) for p in rule.w_contract), 0),
            x_batch=tuple(batched[p] for p in shared),
            w_batch=tuple(self._of_base(p) for p in shared),
            precision=rule.precision,
            preferred=rule.preferred,
        )
        of_x = [n for n in range(x_ndim) if n not in (*rule.x_contract, *inner.x_batch)]
        left = [p for p in range(self.ndim) if p not in (*rule.w_contract, *rule.w_batch)]
        found: list[Any] = [("x", batched[p]) for p in shared] + [("x", n) for n in of_x]
        found += [("w", p) for p in free] + [("w", p) for p in left if not self.new[p]]
        wanted: list[Any] = [("x", n) for n in rule.x_batch]
        kept = [("x", n) for n in range(x_ndim) if n not in (*rule.x_contract, *rule.x_batch)]
        own = [("w", p) for p in left]
        wanted += [*own, *kept] if rule.weight_first else [*kept, *own]
        return inner, (found, wanted)

    def _of_base(self, position: int) -> int:
        """Where an axis that is not new stands in the base."""
        return 1 + sum(not new for new in self.new[:position])

    def _of_coefficients(self, position: int) -> int:
        return sum(self.new[:position])

    def transpose(self, permutation: Sequence[int]) -> "Mixture | None":
        """The experts and the coefficients, each in the order of the axes that are theirs."""
        base = self.base.transpose((0, *(self._of_base(p) for p in permutation if not self.new[p])))
        order = [self._of_coefficients(p) for p in permutation if self.new[p]]
        coefficients = lax.transpose(self.coefficients, (*order, len(order)))
        return _mixed(base, coefficients, tuple(self.new[p] for p in permutation))

    def reshape(self, shape: Sequence[int]) -> "Mixture | None":
        """The experts reshaped, where no new axis takes part."""
        new: list[bool] = []
        sizes: list[int] = []
        for positions, found in match_sizes(self.shape, tuple(shape)) or ():
            taken = any(self.new[p] for p in positions)
            if taken and (len(positions), len(found)) != (1, 1):
                return None
            new += [taken] * len(found)
            sizes += [] if taken else found
        if len(new) != len(shape):
            return None
        return _mixed(self.base.reshape((self.base.shape[0], *sizes)), self.coefficients, tuple(new))

    def map_stack(
        self, position: int, fn: Callable[[Array, int], Array], size: int | None
    ) -> "Mixture | None":
        """The coefficients mapped along a new axis, the experts along another."""
        new = self.new[:position] + self.new[position + (size is None) :]
        if self.new[position]:
            return _mixed(self.base, fn(self.coefficients, self._of_coefficients(position)), new)
        return _mixed(self.base.map_stack(self._of_base(position), fn, size), self.coefficients, new)

    def take_stack(self, position: int, indices: Array, options: tuple[tuple[str, Any], ...]) -> None:
        """None: one of several mixtures is taken by its coefficients first."""
        return None

    def slice_features(self, position: int, cut: range) -> "Mixture | None":
        """The experts sliced."""
        base = self.base.slice_features(self._of_base(position), cut)
        return _mixed(base, self.coefficients, self.new)

    def reverse(self, position: int) -> "Mixture | None":
        """The experts, or the coefficients, reversed."""
        if self.new[position]:
            return _mixed(self.base, lax.rev(self.coefficients, (self._of_coefficients(position),)), self.new)
        return _mixed(self.base.reverse(self._of_base(position)), self.coefficients, self.new)

    def as_stack(self, position: int) -> "Mixture | None":
        """The experts with another stack."""
        return _mixed(self.base.as_stack(self._of_base(position)), self.coefficients, self.new)

    def cast(self, dtype: Any) -> Self:
        """The experts in another dtype; the coefficients stay as exact as they are."""
        return replace(self, base=self.base.cast(dtype))

    def stack_first(self) -> None:
        """None: the experts have no part for each mixture."""
        return None

    def members(self) -> Any:
        """The mixtures one by one, each of all experts."""
        return (self, replace(self, base=None, coefficients=0)) if self.new[0] else None

    def relabeled(self, fn: Callable[[Layout], Layout]) -> Self:
        """The same parts under another layout; a new axis may go at the front."""
        layout = fn(self.layout)
        gone = self.ndim - len(layout.axes)
        if gone < 0 or (gone and not self.new[0]):
            raise PeftError(
                f"{self.layout.name}: a weight that a router mixed cannot leave a loop, nor be taken apart "
                "in one; mix it where it is used"
            )

        def named(at: Layout) -> Layout:
            return replace(at, name=layout.name, one_way=layout.one_way)

        return replace(self, base=self.base.relabeled(named), layout=layout, new=self.new[gone:])


def mixed_by(weight: Weight, coefficients: Array, position: int, first: bool) -> Mixture | None:
    """The members of a stack axis mixed, the axes of the coefficients in front or behind.

    Args:
        weight: the experts.
        coefficients: `[*new axes, E]`.
        position: of the experts' axis.
        first: whether the new axes come first.
    """
    base = weight.transpose((position, *(p for p in range(weight.ndim) if p != position)))
    added, own = (True,) * (coefficients.ndim - 1), (False,) * (weight.ndim - 1)
    return _mixed(base, coefficients, (*added, *own) if first else (*own, *added))


def _mixed(base: Weight | None, coefficients: Array, new: tuple[bool, ...]) -> Mixture | None:
    if base is None:
        return None
    layout, added = base.layout.drop(0), iter(coefficients.shape)
    for position, own in enumerate(new):
        if own:
            layout = layout.with_stack(position, next(added))
    return Mixture(base=base, coefficients=coefficients, layout=layout, new=new)
