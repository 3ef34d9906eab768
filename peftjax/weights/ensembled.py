"""One weight, rescaled on both sides for each member of an ensemble that shares a batch."""

from dataclasses import replace
from typing import Any

import jax
from jax import Array, lax

from peftjax.core.errors import PeftError
from peftjax.weights.base import Weight, cast, contract, dense
from peftjax.weights.canonical import outputs_in_result, side_of, side_to_logical
from peftjax.weights.contraction import Contraction, Dot
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout, Side
from peftjax.weights.sharding import like


@structured
class Ensembled(Weight):
    """`y = ((x ∘ r_i)·base) ∘ s_i + c_i`, i the member whose row of the batch x is.

    `by_input` r `[*stack, k, in]`, `by_output` s and `shift` c `[*stack, k, out]`. The first axis of an
    activation is the batch, perhaps with tokens flattened into it: the k members one after the other, with as
    many rows each. There is one product. Backward keeps the activation before it and the one after it.
    """

    base: Any = logical()
    by_input: Array = canonical("i")
    by_output: Array = canonical("o")
    layout: Layout = static()
    shift: Array | None = canonical("o", default=None)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.by_input.shape[-2]

    def dense(self) -> Array:
        """The array of the only member.

        Raises:
            PeftError: there are several, or it has a shift.
        """
        if self.count > 1 or self.shift is not None:
            raise PeftError(
                f"{self.layout.name}: the members of an ensemble have no single weight; take one of them, "
                "peftjax.member_of, of an ensemble without biases of its own"
            )
        w = dense(self.base)
        for side, factor in (("i", self.by_input), ("o", self.by_output)):
            w = w * side_to_logical(factor[..., 0, :], self.layout, side)
        return w.astype(self.dtype)

    def supports(self, rule: Contraction) -> bool:
        """Products with one matrix, whose activation has its batch first, and what the base supports."""
        if not isinstance(rule, Dot) or self.layout.stack or rule.x_batch or 0 in rule.x_contract:
            return False
        if side_of(self.layout, rule.w_contract) is None or rule.weight_first:
            return False
        return self.shift is None or side_of(self.layout, rule.w_contract) == "i"

    def dot(self, x: Array, rule: Dot) -> Array:
        """The base's product of x scaled, the result scaled and shifted."""
        side = side_of(self.layout, rule.w_contract)
        assert side is not None
        other: Side = "o" if side == "i" else "i"
        entering, leaving = (
            (self.by_input, self.by_output) if side == "i" else (self.by_output, self.by_input)
        )
        met = dict(zip(rule.w_contract, rule.x_contract))
        axes = tuple(met[p] for p in self.layout.positions(side))
        x = _by_member(x, entering, self.layout.sizes(side), axes, self.layout.name)
        y = contract(x, self.base, rule)
        left = sorted(self.layout.positions(other))
        at = dict(zip(left, outputs_in_result(rule, self.layout, y.ndim)))
        axes = tuple(at[p] for p in self.layout.positions(other))
        return _by_member(y, leaving, self.layout.sizes(other), axes, self.layout.name, self.shift)

    def cast(self, dtype: Any) -> "Ensembled":
        """The base in another dtype; the numbers stay as exact as they are."""
        return replace(self, base=cast(self.base, dtype))


def _by_member(
    x: Array,
    gains: Array,
    sizes: tuple[int, ...],
    axes: tuple[int, ...],
    name: str,
    shift: Array | None = None,
) -> Array:
    """X times its member's numbers `[k, n]` along its feature axes, plus those of the shift, in its dtype."""
    members, rows = gains.shape[0], x.shape[0]
    if rows % members:
        raise PeftError(
            f"{name}: {members} members share a batch, but this layer sees an activation {x.shape}, whose "
            f"first axis they do not divide; repeat the batch for each, jnp.tile(x, ({members}, 1))"
        )

    @jax.checkpoint
    def applied(x: Array, gains: Array, shift: Array | None) -> Array:
        y = x.reshape(members, rows // members, *x.shape[1:]) * _along(gains, sizes, axes, x.ndim)
        y = y if shift is None else y + _along(shift, sizes, axes, x.ndim)
        return y.reshape(x.shape).astype(x.dtype)

    return like(applied(x, gains, shift), x)


def _along(numbers: Array, sizes: tuple[int, ...], axes: tuple[int, ...], ndim: int) -> Array:
    """Numbers `[k, n]` broadcastable against `[k, rows, ...]`, n along these axes of the `[rows, ...]`."""
    split = numbers.reshape(len(numbers), *sizes)
    order = sorted(range(len(axes)), key=axes.__getitem__)
    split = lax.transpose(split, (0, *(1 + n for n in order)))
    return lax.expand_dims(split, [1 + n for n in range(ndim) if n not in axes])
