"""Sums of Kronecker products, of linear layers and of convolutions' channels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.core.naming import is_convolution
from peftjax.methods._targets import Target

Slots = Mapping[str, Array]
RULE, LEFT, RIGHT, WHOLE = "rule", "left", "right", "factor"
"""The slots: A [n, n, n], and S as s [n, K·in/n, ρ] and t [n, ρ, out/n], or whole [n, K·in/n, out/n]."""


@dataclass(frozen=True)
class Blocks:
    """How the inputs and outputs of a matrix are cut into n blocks each.

    Attributes:
        count: n.
        window: K, the places of a convolution's window; 1 for a linear layer.
        channels: of the input.
        channels_first: whether, among the inputs, channels come before the places of the window.
    """

    count: int
    window: int
    channels: int
    channels_first: bool

    @property
    def rows(self) -> int:
        """Of each S: K · channels / n."""
        return self.window * self.channels // self.count


def blocks_of(caller: str, target: Target, count: int) -> Blocks:
    """The blocks of a target; those of a convolution are of its channels, not of its window.

    Raises:
        PeftError: n does not divide the channels of both sides.
    """
    sizes, (_, outputs) = target.layout.sizes("i"), target.layout.matrix
    first = target.path.rsplit("/", 1)[-1] == "weight"
    convolved = is_convolution(target.path, len(target.layout.axes))
    channels = (sizes[0] if first else sizes[-1]) if convolved else math.prod(sizes)
    if channels % count or outputs % count:
        raise PeftError(
            f"{caller}: {count} blocks do not divide {target.path!r}, of {channels} inputs and {outputs} "
            "outputs; choose another order or exclude it"
        )
    return Blocks(count, math.prod(sizes) // channels, channels, first)


def drawn(key: Array, shape: tuple[int, ...], fans: int) -> Array:
    """Uniform as Glorot's, ±√(6 / fans)."""
    bound = math.sqrt(6.0 / fans)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


@dataclass(frozen=True)
class Formed:
    """The matrix `Σ_i A_i ⊗ S_i [in, out]` of these blocks."""

    blocks: Blocks

    def __call__(self, slots: Slots) -> Array:
        """Formed in the slots' dtype."""
        factor = slots[WHOLE] if WHOLE in slots else slots[LEFT] @ slots[RIGHT]
        n, size = self.blocks.count, self.blocks.channels // self.blocks.count
        w = jnp.einsum("ipc,ikab->kpacb", slots[RULE], factor.reshape(n, self.blocks.window, size, -1))
        w = w.reshape(self.blocks.window, self.blocks.channels, -1)
        w = w.swapaxes(0, 1) if self.blocks.channels_first else w
        return w.reshape(self.blocks.window * self.blocks.channels, -1)


@dataclass(frozen=True)
class Applied:
    """The map `x·Σ_i A_i ⊗ S_i` of a linear layer's activations, in which no matrix [in, out] is formed."""

    blocks: Blocks

    def __call__(self, slots: Slots, x: Array) -> Array:
        """Of x `[..., in]`, in its dtype."""
        n = self.blocks.count
        slots = {name: slot.astype(x.dtype) for name, slot in slots.items()}
        blocks = x.reshape(*x.shape[:-1], n, -1)
        if WHOLE in slots:
            mixed = jnp.einsum("...pa,ipc->...ica", blocks, slots[RULE])
            y = jnp.einsum("...ica,iab->...cb", mixed, slots[WHOLE])
        else:
            thin = jnp.einsum("...pa,iar->...ipr", blocks, slots[LEFT])
            y = jnp.einsum("...ipr,ipc,irb->...cb", thin, slots[RULE], slots[RIGHT])
        return y.reshape(*x.shape[:-1], -1)
