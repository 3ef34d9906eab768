"""A low-rank update of a weight of which the entries with the smallest trained scores are zero."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from peftjax.weights.base import Weight, dense, lazily_merged
from peftjax.weights.canonical import to_canonical, to_logical
from peftjax.weights.contraction import Contraction
from peftjax.weights.fields import Slots, canonical, logical, stacked, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.sharding import like, whole
from peftjax.weights.stack_members import over_stack
from peftjax.weights.views import WholeMatrices

Pattern = tuple[int, int]
"""`(n, m)`: of each m consecutive inputs of an output, n are kept."""


@structured
class ScorePruned(WholeMatrices, Weight):
    """`w = (base + scale · aᵀb) ∘ M`, M zero at the smallest scores of each matrix.

        scores = |base + scale · aᵀb| + cᵀd + inputs 1ᵀ + 1 outputsᵀ

    In the backward pass the gradient of M is that of the scores, as it is (straight through). The entries
    below a threshold are pruned, so that equal ones are kept together; with a pattern, exactly m - n of m.

    It is formed in float32 in its layer. Backward keeps x, the slots and the threshold, and forms it again;
    the dense gradient lives for one layer.

    Attributes:
        base: the array or weight that is changed.
        slots: `a [*stack, r, in]`, `b [*stack, r, out]`, `c` and `d` likewise or neither,
            `inputs [*stack, in]` and `outputs [*stack, out]`.
        pruned: int32 `[*stack]`, how many entries of a matrix are pruned; with a pattern, whether any is.
        layout: of the logical axes.
        scale: of the update.
        pattern: instead of a number for the whole matrix.
        threshold: float32 `[*stack]`, what the scores that are kept exceed, once it is known.
        compute_dtype: what it was cast to, if not the base's.
    """

    base: Any = logical()
    slots: Slots = stacked()
    pruned: Array = canonical()
    layout: Layout = static()
    scale: float = static(default=1.0)
    pattern: Pattern | None = static(default=None)
    threshold: Array | None = canonical(default=None)
    compute_dtype: Any = static(default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that the weight was cast to, or the base's."""
        return self.base.dtype if self.compute_dtype is None else self.compute_dtype

    def dense(self) -> Array:
        """The pruned sum, in this weight's dtype."""
        w = self._with_threshold()
        base = dense(self.base)

        def one(base: Array, slots: Slots, pruned: Array, threshold: Array) -> Array:
            new, scores = _scored(slots, base, self.scale)
            hard = lax.stop_gradient(self._kept(scores, pruned, threshold))
            return new * (hard + (scores - lax.stop_gradient(scores)))

        formed = over_stack(one, len(self.layout.stack))(
            self._matrices(base), self.slots, self.pruned, w.threshold
        )
        return like(to_logical(formed, self.layout), base).astype(self.dtype)

    def cast(self, dtype: Any) -> "ScorePruned":
        """The same parts: scores are of the base as it is, and the weight is cast when it is made."""
        return replace(self, compute_dtype=jnp.dtype(dtype))

    def _contract(self, x: Array, rule: Contraction) -> Array:
        return lazily_merged(rule, x, self._with_threshold())

    def _with_threshold(self) -> "ScorePruned":
        """The threshold found once, so that backward does not search again."""
        if self.threshold is not None:
            return self
        if self.pattern is not None:
            return replace(self, threshold=jnp.zeros(self.pruned.shape, jnp.float32))

        def one(base: Array, slots: Slots, pruned: Array) -> Array:
            return threshold_of(_scored(slots, base, self.scale)[1], pruned)

        operands = lax.stop_gradient((self._matrices(dense(self.base)), self.slots, self.pruned))
        return replace(self, threshold=over_stack(one, len(self.layout.stack))(*operands))

    def _matrices(self, base: Array) -> Array:
        return to_canonical(whole(base), self.layout).astype(jnp.float32)

    def _kept(self, scores: Array, pruned: Array, threshold: Array) -> Array:
        if self.pattern is None:
            return (scores >= threshold).astype(jnp.float32)
        return jnp.where(pruned > 0, in_pattern(scores, self.pattern), 1.0)


def threshold_of(scores: Float[Array, "n m"], pruned: Int[Array, ""]) -> Float[Array, ""]:
    """The middle between the smallest score that is kept and the largest of the `pruned` ones.

    It is none of the scores, which another program may round otherwise.
    """
    kept = smallest_kept(scores, pruned)
    below = jnp.max(jnp.where(scores < kept, scores, -jnp.inf))
    return jnp.where(pruned > 0, 0.5 * below + 0.5 * kept, -jnp.inf)


def smallest_kept(scores: Float[Array, "n m"], pruned: Int[Array, ""]) -> Float[Array, ""]:
    """The score that `pruned` scores precede in ascending order, found from counts, without a sort.

    Counts are sums, so that a divided matrix has the threshold of the whole one.
    """
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1) << 31
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)  # as unsigned integers, in the order of the floats

    def narrow(i: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(ordered < candidate, dtype=jnp.int32) <= pruned, candidate, found)

    found = lax.fori_loop(0, 32, narrow, jnp.uint32(0))
    return lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)


def in_pattern(scores: Float[Array, "n m"], pattern: Pattern) -> Float[Array, "n m"]:
    """1 at the n largest scores of each m consecutive inputs, the earlier of equals, else 0."""
    kept, of = pattern
    groups = scores.reshape(-1, of, scores.shape[-1])
    place = jnp.argsort(jnp.argsort(-groups, axis=1, stable=True), axis=1)
    return (place < kept).astype(jnp.float32).reshape(scores.shape)


def _scored(slots: Mapping[str, Array], base: Array, scale: float) -> tuple[Array, Array]:
    """The weight before it is pruned, and its scores."""
    new = base + scale * (slots["a"].T @ slots["b"])
    scores = jnp.abs(new) + slots["inputs"][:, None] + slots["outputs"][None, :]
    return new, scores + slots["c"].T @ slots["d"] if "c" in slots else scores
