"""A frozen weight as a sum of blocks of one bit a number, of which any first few are an approximation."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.quantize.packing import unpack
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_logical
from peftjax.weights.fields import canonical, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.views import WholeMatrices


@structured
class SignBlocks(WholeMatrices, Weight):
    """`w = Σ_i S_i ∘ (a_iᵀ b_i)`, a weight without a base; S_i are signs.

    A layer adds the blocks up for its product, in the forward pass and again in the backward pass, which
    keeps signs and factors alone. A block whose b is zero counts for nothing. A byte has the signs of several
    outputs, so that matrices are not cut.

    Attributes:
        signs: uint8 `[*stack, blocks, in, bytes]`, 8 outputs to a byte, the first in the high bit; 1 is +.
        a: float16 `[*stack, blocks, r, in]`.
        b: float16 `[*stack, blocks, r, out]`.
        layout: of the logical axes.
        of_dtype: of the array that it stands for.
    """

    signs: Array = canonical()
    a: Array = canonical("i")
    b: Array = canonical("o")
    layout: Layout = static()
    of_dtype: Any = static()

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return jnp.dtype(self.of_dtype)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.a.shape[-3]

    def dense(self) -> Array:
        """The sum of the blocks, rounded once, from float32 to its dtype."""
        at = len(self.layout.stack)
        parts = [jnp.moveaxis(lax.stop_gradient(part), at, 0) for part in (self.signs, self.a, self.b)]

        def added(total: Array, block: list[Array]) -> tuple[Array, None]:
            return total + signed_product(*block), None

        first = signed_product(*(part[0] for part in parts))
        total, _ = lax.scan(added, first, [part[1:] for part in parts])
        return to_logical(total, self.layout).astype(self.dtype)

    def cast(self, dtype: Any) -> "SignBlocks":
        """The same blocks, whose sum is rounded to another dtype."""
        return replace(self, of_dtype=jnp.dtype(dtype))


def signed_product(signs: Array, a: Array, b: Array) -> Array:
    """`S ∘ (aᵀb)` of one block, float32 `[*stack, in, out]`."""
    product = jnp.einsum(
        "...ri,...ro->...io", a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return jnp.where(unpack(signs, 1, b.shape[-1]) == 1, product, -product)
