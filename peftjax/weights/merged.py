"""A weight with axes of several kinds merged into one, as by `vmap` and by gradients of convolutions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core.shapes import refined
from peftjax.weights.base import Weight, contract, dense
from peftjax.weights.composed import Composed
from peftjax.weights.contraction import Contraction, Conv, Dot
from peftjax.weights.fields import logical, static, structured
from peftjax.weights.layout import Axis, Layout
from peftjax.weights.stack_members import over_members, true_of_member
from peftjax.weights.views import reshape


@structured
class Merged(Composed):
    """`reshape(base)`: axis p is `counts[p]` neighboring axes of the base in one.

    A product meets the base's own axes. A convolution whose output features hold a stack, such as the
    members of an ensemble, or groups that are part of the features it meets, is one for each of these.
    """

    base: Weight = logical()
    layout: Layout = static()
    counts: tuple[int, ...] = static()

    def dense(self) -> Array:
        """The base's array, reshaped."""
        return dense(self.base).reshape(self.shape)

    def supports(self, rule: Contraction) -> bool:
        """Products as the base, and convolutions of which each is one that its member supports."""
        if isinstance(rule, Dot):
            return self.base.supports(self._apart(rule))
        if not isinstance(rule, Conv):
            return False
        plan = self._plan(rule)
        if plan is None:
            return False
        weight, position, shape, inner, _ = plan

        def supported(one: Weight) -> bool:
            kernel = regrouped(one, shape)
            return kernel is not None and kernel.supports(inner)

        return true_of_member(supported, weight, position)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The product with the base, whose axes x is given too."""
        sizes: list[int] = []
        met = dict(zip((*rule.x_contract, *rule.x_batch), (*rule.w_contract, *rule.w_batch)))
        for axis, size in enumerate(x.shape):
            sizes += self._sizes(met[axis]) if axis in met else [size]
        y = contract(x.reshape(sizes), self.base, self._apart(rule))
        of_x = [size for axis, size in enumerate(x.shape) if axis not in met]
        used = {*rule.w_contract, *rule.w_batch}
        of_w = [size for p, size in enumerate(self.shape) if p not in used]
        free = [*of_w, *of_x] if rule.weight_first else [*of_x, *of_w]
        return y.reshape([*(self.shape[p] for p in rule.w_batch), *free])

    def conv(self, x: Array, rule: Conv) -> Array:
        """One convolution for each member of an axis within the output features."""
        plan = self._plan(rule)
        assert plan is not None
        weight, position, shape, inner, split = plan
        before, size = split[0], weight.shape[position]
        channel, out = rule.dimension_numbers.lhs_spec[1], rule.dimension_numbers.out_spec[1]
        axis = None
        if inner.feature_group_count != rule.feature_group_count:  # each member has its own groups of x
            apart = x.reshape(*x.shape[:channel], before, size, -1, *x.shape[channel + 1 :])
            x, axis = jnp.moveaxis(apart, channel + 1, 0), 0
            x = x.reshape(*x.shape[: channel + 1], -1, *x.shape[channel + 3 :])

        def of_one(one: Weight, x: Array) -> Array:
            return contract(x, regrouped(one, shape), inner)

        y = over_members(of_one, weight, position, x, axes=(axis,))
        y = y.reshape(*y.shape[: out + 1], before, -1, *y.shape[out + 2 :])
        y = jnp.moveaxis(y, 0, out + 1)
        return y.reshape(*y.shape[:out], -1, *y.shape[out + 3 :])

    def _plan(self, rule: Conv) -> tuple[Weight, int, tuple[int, ...], Conv, tuple[int, int]] | None:
        """The weight, which of its axes the members are of, the kernel's shape and the rule of one."""
        out_axis, in_axis = rule.dimension_numbers.rhs_spec[:2]
        groups = self._positions(out_axis)
        if len(groups) < 2 or any(n != 1 for p, n in enumerate(self.counts) if p != out_axis):
            return None
        kinds = [self.base.layout.axes[p].kind for p in groups]
        met = self.layout.axes[in_axis].kind
        weight = self.base
        if "s" in kinds:
            n = kinds.index("s")
        elif met in kinds:
            n = kinds.index(met)
            weight = weight.as_stack(groups[n])
        else:
            return None
        sizes = self._sizes(out_axis)
        before, size, after = math.prod(sizes[:n]), sizes[n], math.prod(sizes[n + 1 :])
        count = rule.feature_group_count
        if before % count:  # the groups are divided among the members
            count, left = divmod(count, size)
            if left or count % before or after % (count // before):
                return None
        if weight is None:
            return None
        shape = (*self.shape[:out_axis], before * after, *self.shape[out_axis + 1 :])
        return weight, groups[n], shape, replace(rule, feature_group_count=count), (before, after)

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The base transposed, axes that became one together."""
        base = self.base.transpose([p for q in permutation for p in self._positions(q)])
        return None if base is None else _merged(base, tuple(self.counts[q] for q in permutation))

    def reshape(self, shape: Sequence[int]) -> Any:
        """The base in another shape."""
        return regrouped(self.base, shape)

    def map_stack(self, position: int, fn: Callable[[Array, int], Array], size: int | None) -> Any:
        """The base mapped along an axis of its own."""
        if self.counts[position] != 1:
            return None
        base = self.base.map_stack(self._positions(position)[0], fn, size)
        counts = self.counts[:position] + self.counts[position + (size is None) :]
        return None if base is None else _merged(base, counts)

    def take_stack(self, position: int, indices: Array, options: tuple[tuple[str, Any], ...]) -> Any:
        """Members of a stack axis that is one of the base."""
        if self.counts[position] != 1:
            return None
        base = self.base.take_stack(self._positions(position)[0], indices, options)
        counts = (*(1,) * (indices.ndim - 1), *self.counts[:position], *self.counts[position + 1 :])
        return None if base is None else _merged(base, counts)

    def slice_features(self, position: int, cut: range) -> Any:
        """A slice along an axis of the base."""
        if self.counts[position] != 1:
            return None
        base = self.base.slice_features(self._positions(position)[0], cut)
        return None if base is None else _merged(base, self.counts)

    def reverse(self, position: int) -> Any:
        """All axes that became this one, reversed."""
        base: Weight | None = self.base
        for p in self._positions(position):
            base = None if base is None else base.reverse(p)
        return None if base is None else _merged(base, self.counts)

    def stack_first(self) -> Any:
        """The base's stack axis first, where that is an axis of its own."""
        base = self.base.stack_first() if self.counts[0] == 1 else None
        return None if base is None else _merged(base, self.counts)

    def members(self) -> Any:
        """The base's members, where its first axis is one of its own."""
        found = self.base.members() if self.counts[0] == 1 else None
        if found is None:
            return None
        whole = _merged(found[0], self.counts)
        return (whole, found[1] if not isinstance(found[1], Weight) else replace(whole, base=found[1]))

    def relabeled(self, fn: Callable[[Layout], Layout]) -> Any:
        """The base under another layout; axes come and go at the front."""
        base = self.base.relabeled(fn)
        moved = base.ndim - self.base.ndim
        return _merged(base, self.counts[-moved:] if moved < 0 else ((1,) * moved + self.counts))

    def as_stack(self, position: int) -> None:
        """None: what is one axis for the model is not one of the base's."""
        return None

    def _positions(self, axis: int) -> range:
        start = sum(self.counts[:axis])
        return range(start, start + self.counts[axis])

    def _sizes(self, axis: int) -> list[int]:
        return [self.base.shape[p] for p in self._positions(axis)]

    def _apart(self, rule: Dot) -> Dot:
        """The rule on the base's own axes."""
        grown = dict(zip((*rule.x_contract, *rule.x_batch), (*rule.w_contract, *rule.w_batch)))

        def of_w(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(p for axis in axes for p in self._positions(axis))

        def of_x(axes: tuple[int, ...]) -> tuple[int, ...]:
            found: list[int] = []
            for axis in axes:
                start = axis + sum(self.counts[grown[q]] - 1 for q in grown if q < axis)
                found += range(start, start + self.counts[grown[axis]])
            return tuple(found)

        return replace(
            rule,
            x_contract=of_x(rule.x_contract),
            w_contract=of_w(rule.w_contract),
            x_batch=of_x(rule.x_batch),
            w_batch=of_w(rule.w_batch),
            out_sharding=None,
        )


def regrouped(w: Weight, shape: Sequence[int]) -> Any:
    """`jnp.reshape(w, shape)` also where axes of several kinds become one; None where they would be mixed."""
    base = w.base if isinstance(w, Merged) else w
    view = reshape(base, shape)
    if view is not None:
        return view
    found = refined(base.shape, tuple(shape))
    if found is None:
        return None
    sizes, counts = found
    apart = base if sizes == base.shape else reshape(base, sizes)
    return None if apart is None else _merged(apart, counts)


def _merged(base: Weight, counts: tuple[int, ...]) -> Any:
    if all(n == 1 for n in counts):
        return base
    axes, starts = [], [0, *accumulate(counts)]
    for n, start in zip(counts, starts):
        own = base.layout.axes[start : start + n]
        axes.append(own[0] if n == 1 else Axis("m", start, math.prod(a.size for a in own)))
    return Merged(base=base, layout=replace(base.layout, axes=tuple(axes)), counts=counts)
