"""What every structured weight is: a frozen pytree that a model uses where it expects an array."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import GatherScatterMode

from peftjax.core.errors import PeftError
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot, met_axes
from peftjax.weights.sharding import like, type_of
from peftjax.weights.views import Views


class Weight(Views):
    """A weight that is not one dense array; it has the shape and dtype of the array it stands for.

    A subclass declares its fields (`peftjax.weights.fields`) and gives `dense()` and, where its method has an
    activation-space form, its own `dot`, `gather`, `conv` and `ragged_dot`. The ones given here merge the
    weight inside the layer and keep none of the merged weight for the backward pass.

    Attributes:
        base: the array or weight that this one changes. One that stands for itself, such as factors or codes,
            has none, and gives its own `dtype`.
        may_mix: whether its stack may be summed over, as the experts of a router.
        has_dense: whether there is an array that it stands for.
    """

    base: Any = None
    may_mix: ClassVar[bool] = True
    has_dense: ClassVar[bool] = True

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for: its base's."""
        if self.base is None:
            raise NotImplementedError(f"{type(self).__name__} has no base, and so gives its own dtype")
        return self.base.dtype

    def typeof(self) -> jax.ShapeDtypeStruct:
        """As `jax.typeof` of the array this weight stands for, sharded as the innermost base is, if any."""
        innermost = self.base
        while isinstance(innermost, Weight):
            innermost = innermost.base
        return type_of(innermost, self.shape, self.dtype)

    @abc.abstractmethod
    def dense(self) -> Array:
        """The array this weight stands for."""

    def supports(self, rule: Contraction) -> bool:
        """Whether the rule can be applied without forming the dense weight for longer than a layer."""
        return True

    def dot(self, x: Array, rule: Dot) -> Array:
        """X times this weight."""
        return self._contract(x, rule)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """Rows of this weight."""
        return self._contract(indices, rule)

    def conv(self, x: Array, rule: Conv) -> Array:
        """X convolved with this weight."""
        return self._contract(x, rule)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """Rows of x times their experts' matrices."""
        return self._contract(x, rule)

    def _contract(self, x: Array, rule: Contraction) -> Array:
        """What all kinds of products have in common, where they do."""
        return lazily_merged(rule, x, self)


def dense(w: Any) -> Array:
    """The array itself, or the array that a structured weight stands for."""
    return w.dense() if isinstance(w, Weight) else w


def cast(w: Any, dtype: Any) -> Any:
    """An array, or every float part of a structured weight, in another dtype."""
    return w.cast(dtype) if isinstance(w, Weight) else w.astype(dtype)


def contract(x: Array, w: Any, rule: Contraction) -> Array:
    """Apply a rule to an activation and an array or a structured weight: the one way weights act."""
    if not isinstance(w, Weight):
        return rule(x, w)
    _require_way(w, rule)
    if isinstance(rule, Gather):
        return _looked_up(x, w, rule)
    x = _promoted(x, w, rule)
    if isinstance(rule, Dot):
        return w.dot(x, rule)
    return w.conv(x, rule) if isinstance(rule, Conv) else w.ragged_dot(x, rule)


def _require_way(w: Weight, rule: Contraction) -> None:
    """Raise a PeftError where an activation meets the outputs of a weight whose axes are guessed."""
    if w.layout.one_way and set(met_axes(rule)) & set(w.layout.positions("o")):
        raise PeftError(
            f"{w.layout.name}: an activation meets the side that was taken for the output, since the name "
            "does not tell the axes: give those of the parameter, such as "
            f"layouts={{{w.layout.name!r}: 'oi'}}, or layouts=peftjax.layouts_of(f, params, *inputs)"
        )


def _looked_up(indices: Array, w: Weight, rule: Gather) -> Array:
    """Rows of w; the lookup's mode is applied here, once for all parts, which see valid numbers only.

    A row that is filled in reaches no part: neither its fill value nor the (masked, perhaps undefined)
    cotangent that comes back for it.
    """
    options = dict(rule.options)
    mode, fill = options.get("mode"), options.get("fill_value")
    if mode not in (GatherScatterMode.FILL_OR_DROP, GatherScatterMode.CLIP):
        return w.gather(indices, rule)
    last = min(w.shape[rule.axis] - 1, jnp.iinfo(indices.dtype).max)
    # Numbers that are clipped may be equal.
    options |= {"mode": GatherScatterMode.CLIP, "fill_value": None, "unique_indices": False}
    rows = w.gather(jnp.clip(indices, 0, last), Gather(rule.axis, tuple(options.items())))
    if mode == GatherScatterMode.CLIP:
        return rows

    @jax.checkpoint  # backward keeps the numbers alone, and no mask of the rows' size
    def filled(rows: Array, indices: Array) -> Array:
        inside = (indices == jnp.clip(indices, 0, last))[..., 0]
        inside = lax.broadcast_in_dim(inside, rows.shape, range(inside.ndim))
        return jnp.where(like(inside, rows), rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))

    return filled(rows, indices)


def _promoted(x: Array, w: Weight, rule: Dot | Conv | RaggedDot) -> Array:
    """X in a dtype that the parts of w can be cast to.

    Integers, booleans and floats of one byte take the dtype that jnp gives the product: parts cast to
    theirs would be truncated, and lose their gradient.
    """
    if jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize > 1:
        return x
    asked = None if rule.preferred is None else jnp.dtype(rule.preferred)
    wider = asked is not None and jnp.issubdtype(asked, jnp.inexact) and asked.itemsize > w.dtype.itemsize
    return x.astype(asked if wider else w.dtype)


def matmul(x: Array, w: Any) -> Array:
    """`x @ w` for an activation `[..., in]` and an array or structured weight `[in, out]`."""
    return contract(x, w, Dot(x_contract=(x.ndim - 1,), w_contract=(0,)))


def lazily_merged(rule: Callable[[Array, Array], Array], x: Array, w: Weight) -> Array:
    """The rule on x and the dense weight, which is recomputed in backward: only its parts are kept."""
    return jax.checkpoint(lambda x, w: rule(x, w.dense()))(x, w)
