"""A weight whose layer gets a bias that the model does not have."""

from collections.abc import Callable
from typing import Any

from jax import Array

from peftjax.core.errors import PeftError
from peftjax.weights.base import Weight, contract
from peftjax.weights.canonical import along_result, side_of, side_to_logical
from peftjax.weights.contraction import Contraction, Conv, Dot
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout


@structured
class Shifted(Weight):
    """`x -> x·base + shift`, with `shift [*stack, out]`: a weight and the bias of its layer.

    It is used in products over all inputs and in convolutions, once for each output. The backward pass keeps
    nothing for the shift.
    """

    base: Any = logical()
    shift: Array = canonical("o")
    layout: Layout = static()

    def dense(self) -> Array:
        """There is none: no weight holds a bias."""
        raise PeftError(
            f"{self.layout.name}: the adapter adds a bias to this layer, which has none and whose weight "
            "cannot hold it: the adapter cannot be merged, and runs as it is"
        )

    def supports(self, rule: Contraction) -> bool:
        """Products over all inputs and convolutions, where the base takes them."""
        if isinstance(self.base, Weight) and not self.base.supports(rule):
            return False
        if isinstance(rule, Conv):
            return self.layout.positions("o") == (rule.dimension_numbers.rhs_spec[0],)
        return isinstance(rule, Dot) and side_of(self.layout, rule.w_contract) == "i"

    def dot(self, x: Array, rule: Dot) -> Array:
        """The base's product with the bias added."""
        y = contract(x, self.base, rule)
        shift = side_to_logical(self.shift, self.layout, "o")
        return y + along_result(shift, rule, self.layout, y.ndim).astype(y.dtype)

    def conv(self, x: Array, rule: Conv) -> Array:
        """The base's convolution with the bias added to its channels."""
        y = contract(x, self.base, rule)
        shape = [1] * y.ndim
        shape[rule.dimension_numbers.out_spec[1]] = -1
        return y + self.shift.reshape(shape).astype(y.dtype)

    def slice_features(self, position: int, cut: range) -> "Shifted | None":
        """A slice of outputs; the products of slices of inputs would each have the bias."""
        outputs = self.layout.axes[position].kind == "o"
        return super().slice_features(position, cut) if outputs else None

    def part_specs(self, spec: Any) -> "Shifted | None":
        """None where inputs are sharded: the sum over the shards would have the bias of each."""
        return None if self.divides(spec, ("i",)) else super().part_specs(spec)

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> "Shifted | None":
        """None for inputs, which have to be whole."""
        outputs = self.layout.axes[position].kind == "o"
        return super().gather_features(position, mesh_axes, fn, size) if outputs else None
