"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with one A for the model.

Paper: Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021, arXiv
2106.04647.

    h + f(h W_down + b) W_up + b'        W = Σ_i A_i ⊗ (s_i t_i), i = 1 ... n

h [B, S, D] is what a branch adds to the stream, A [n, n, n] is shared by all matrices, s_i [in/n, ρ] and t_i
[ρ, out/n] are each one's own. Both matrices are applied block by block and never formed. Trained: n³ numbers
for the model, and 2 ρ (D + r) + D + r an adapter. Backward keeps, per token and adapter, h and the r values
before f. A ~ N(0, init_std²), so that a fresh adapter is nearly the identity; s and t are uniform, of √2
times Glorot's bound. Weight decay on A shrinks all adapters: leave it off. The defaults are the released
configuration's: n = 4, ρ = 1, and r = D / 32 of T5-base.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from peftjax.backbone.rewriting import BlockStack
from peftjax.core.checks import at_least, one_of, positive
from peftjax.core.errors import PeftError
from peftjax.methods._parts import Layers, of_parts
from peftjax.methods._targets import key_for
from peftjax.methods._weights import SHARED
from peftjax.methods.bottleneck._bottleneck import Adapters, Bottleneck, Layer
from peftjax.methods.bottleneck.adapters import PLACES, Places
from peftjax.methods.structured._kronecker import LEFT, RIGHT, RULE, Applied, Blocks, drawn
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@register(
    kind="adapter",
    paper="Compacter, Mahabadi et al. 2021, arXiv 2106.04647",
    trains="2 (2 ρ (D + r) + D + r) a layer, and n³ in all",
    backward_keeps="what both branches give and 2 r values a token",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"size": 4, "order": 2, "init_std": 0.3}, starts_as_base=False),
)
def compacter(
    *,
    size: int = 24,
    order: int = 4,
    rank: int = 1,
    places: Places = "both",
    activation: str = "gelu_new",
    init_std: float = 1e-4,
    dropout: float = 0.0,
    layers: Layers = None,
) -> Transform:
    """Adapters made of Kronecker products that share one A (arXiv 2106.04647).

    Args:
        size: r, the width of the bottleneck.
        order: n, which divides r and the width of the model.
        rank: ρ.
        places: "both" is Compacter, "feed_forward" Compacter++, or "attention"; cross-attention has none.
        activation: f, as of `houlsby`.
        init_std: deviation of A at the start.
        dropout: rate after the activation.
        layers: numbers of the layers to adapt; None is all.

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, when it is not a backbone's, and in
            `init` for a model whose width the order does not divide.
    """
    one_of("compacter", "places", places, PLACES)
    at_least("compacter", "init_std", init_std, 0)
    bottleneck = PhmBottleneck(size, activation=activation, dropout=dropout, order=order, rank=rank)
    of = {place: bottleneck for place in PLACES[:2] if places in (place, "both")}
    plain = of_parts("compacter", [PhmAdapters(**of, in_cross_attention=False)], layers)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        frozen, trainable = plain.init(key, params)
        rule = init_std * jax.random.normal(key_for(key, SHARED), (order,) * 3)
        return frozen, {SHARED: {RULE: rule}, **trainable}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        own = {stack: {**trainable[stack], **trainable[SHARED]} for stack in trainable if stack != SHARED}
        return plain.apply(frozen, own, key=key)

    return dataclasses.replace(plain, init=init, apply=apply)


@dataclasses.dataclass(frozen=True)
class PhmBottleneck(Bottleneck):
    """A bottleneck whose matrices are sums of Kronecker products; the layer it runs on has A beside them.

    Attributes:
        order: n.
        rank: ρ.
    """

    order: int = 4
    rank: int = 1

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for a setting out of range."""
        super().require_valid(caller)
        positive(caller, "order", self.order)
        positive(caller, "rank", self.rank)
        if self.size % self.order:
            raise PeftError(
                f"{caller}: {self.order} blocks do not divide a bottleneck of {self.size}; choose another "
                "order or size"
            )

    def start(self, part: str, key: Key[Array, ""], shape: tuple[int, int, int]) -> dict[str, Array]:
        """The factors s [layers, n, in/n, ρ] and t [layers, n, ρ, out/n]."""
        (layers, *sides), n, keys = shape, self.order, jax.random.split(key)
        if any(side % n for side in sides):
            width = max(sides)
            raise PeftError(f"compacter: {n} blocks do not divide a model of width {width}; change order")
        rows, columns = (side // n for side in sides)
        left = drawn(keys[0], (layers, n, rows, self.rank), rows + self.rank)
        right = drawn(keys[1], (layers, n, self.rank, columns), self.rank + columns)
        return {LEFT: math.sqrt(2.0) * left, RIGHT: math.sqrt(2.0) * right}

    def project(self, layer: Layer, part: str, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x W + b`, in the dtype of x."""
        own, applied = layer[part], Applied(Blocks(self.order, 1, x.shape[-1], False))
        y = applied({LEFT: own[LEFT], RIGHT: own[RIGHT], RULE: layer[RULE]}, x)
        return y + own["bias"].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class PhmAdapters(Adapters):
    """`Adapters` whose layers are given the one A that is among what is trained."""

    def added(self, trained: Layer, stack: BlockStack, key: Key[Array, ""] | None) -> dict[str, Any]:
        """The bottlenecks by their branch, each with A."""
        rule = trained[RULE]
        rules = jnp.broadcast_to(rule, (len(stack.layers), *rule.shape))
        return {branch: {**own, RULE: rules} for branch, own in super().added(trained, stack, key).items()}
