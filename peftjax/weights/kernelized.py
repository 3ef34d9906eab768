"""`W + dW^s`, dW^s a sparsified kernel function of two low-rank factors: the update of SNELL and SNELLA."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from peftjax.kernels.kernelized_merge import KernelFunction, sparse_update
from peftjax.weights.added import contract_added
from peftjax.weights.base import Weight, cast, dense
from peftjax.weights.canonical import to_logical
from peftjax.weights.contraction import Contraction
from peftjax.weights.fields import canonical, logical, random_key, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.sharding import like


@structured
class Kernelized(Weight):
    """`w = base + dW^s(a, b)` with `a [*stack, P, q, in]` and `b [*stack, P, q, out]`, float32.

    scalars: `[*stack, k]`, those of the kernel function in its order; threshold: `[*stack]`, of |dW|, a
    constant. None where it has none.

    dW^s has no form in activation space. Where the base is a plain float32 array and no dropout acts, the
    layer merges: one product with `base + dW^s`, recomputed in the backward pass. Otherwise there are two
    products, `x·base + drop(x)·dW^s`: a sum in bfloat16 would round updates below 1/512 of the base's
    entries away, and a quantized base keeps its own rule. Either way backward keeps x, the factors, the
    scalars and the threshold, and nothing of the weight's size. The mask is recomputed from the key.
    """

    base: Any = logical()
    a: Array = canonical("i")
    b: Array = canonical("o")
    layout: Layout = static()
    kernel_function: KernelFunction = static()
    scalars: Array | None = canonical(default=None)
    threshold: Array | None = canonical(default=None)
    dropout: float = static(default=0.0)
    key: Array | None = random_key(default=None)

    def delta(self) -> Array:
        """dW^s in the logical shape, float32."""
        stack = self.a.shape[:-3]
        t = jnp.zeros(stack, jnp.float32) if self.threshold is None else self.threshold
        values = () if self.scalars is None else jnp.moveaxis(self.scalars, -1, 0)
        scalars = dict(zip(self.kernel_function.scalars, values))
        return to_logical(sparse_update(self.a, self.b, scalars, t, self.kernel_function), self.layout)

    def dense(self) -> Array:
        """`base + dW^s`, summed in float32, in the base's dtype."""
        base = dense(self.base)
        return (base.astype(jnp.float32) + like(self.delta(), base)).astype(self.dtype)

    def supports(self, rule: Contraction) -> bool:
        """Whatever the base supports."""
        return not isinstance(self.base, Weight) or self.base.supports(rule)

    def _contract(self, x: Array, rule: Contraction) -> Array:
        return contract_added(x, self, rule)

    def cast(self, dtype: Any) -> "Kernelized":
        """The base in another dtype; the factors stay float32: dW is a small difference of distances."""
        return replace(self, base=cast(self.base, dtype))

    def slice_features(self, position: int, cut: range) -> "Kernelized | None":
        """A slice, with the whole matrix's threshold; a softmax over the outputs needs all of them."""
        if self.kernel_function.mixed and self.layout.axes[position].kind == "o":
            return None
        return super().slice_features(position, cut)

    def as_stack(self, position: int) -> "Kernelized | None":
        """As other weights'; a softmax over the outputs needs all of them."""
        return (
            None
            if self.kernel_function.mixed and self.layout.axes[position].kind == "o"
            else super().as_stack(position)
        )

    def part_specs(self, spec: PartitionSpec) -> "Kernelized | None":
        """As other weights'; None where a softmax over the outputs would see some of them only."""
        if self.kernel_function.mixed and any(spec[p] for p in self.layout.positions("o") if p < len(spec)):
            return None
        return super().part_specs(spec)

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> "Kernelized | None":
        """As other weights'; None where a softmax over the outputs would see repeated ones."""
        if self.kernel_function.mixed and self.layout.axes[position].kind == "o":
            return None
        return super().gather_features(position, mesh_axes, fn, size)
