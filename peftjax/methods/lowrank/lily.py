"""LILY: low-rank factors shared between layers, the second one mixed by a router for each call.

Paper: Zhong et al., "Low-Rank Interconnected Adaptation across Layers", ACL 2025 Findings, arXiv 2407.09946.

    z = x·aᵀ      p = mean over all tokens of softmax(z·qᵀ)      y = x·W + scale · z·(Σ_e p_e b_e)

a [r, in] of `stride` neighboring layers, b [e, r, out] of all layers, for the matrices of one name and shape;
the router q [e, r] of each matrix. Trained: all of them, float32. Start: a ~ U(±1/√in), q ~ U(±1/√r), b = 0.
What is added depends on all tokens of a call, so that it has no merged form. Backward keeps x. Defaults are
those of the usual PyTorch library.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.core.naming import is_convolution, is_embedding
from peftjax.methods._options import RankOptions
from peftjax.methods._pools import PooledTarget, in_pools, numbered, of_pool, pooled
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.mapped_rows import MappedRows


@dataclass(frozen=True, kw_only=True)
class LilyOptions(RankOptions):
    """Those of `lily`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        stride: how many neighboring layers share a first factor.
        experts: e, the second factors that all layers share.
        scale: of the update.
    """

    rank: int = 32
    stride: int = 1
    experts: int = 2
    scale: float = 1.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "stride", self.stride)
        positive(caller, "scale", self.scale)
        at_least(caller, "experts", self.experts, 2)

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with those that it shares factors with."""
        found = super().find(caller, params, one_way=one_way, **ranks)

        def kind(target: Target) -> Any:
            return target.layout.matrix, target.rank

        return [*pooled(found, kind, layers_pattern=self.layers_pattern)]


@register(
    kind="adapter",
    paper="LILY, Zhong et al. 2025, arXiv 2407.09946",
    trains="r·in/stride + e·r, and e·r·out once for all layers",
    backward_keeps="the input x (shared)",
    mergeable=False,
    conformance=Conformance(example={"rank": 2, "scale": 4.0, "targets": "(?!.*(experts|conv)).*kernel"}),
)
@takes(LilyOptions)
def lily(options: LilyOptions) -> Transform:
    """Train factors that layers share, mixed by a router (arXiv 2407.09946).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters, or a lookup table or a convolution among them.
    """
    experts, stride = options.experts, options.stride

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        pools: Slots = {}
        for pool, (target, *_) in in_pools(targets).items():
            (n, m), r = target.layout.matrix, target.rank
            own, bound = jax.random.fold_in(key, pool), 1.0 / math.sqrt(n)
            shape = (-(-target.sharing // stride), r, n)
            a = jax.random.uniform(own, shape, minval=-bound, maxval=bound)
            pools |= numbered({"a": a, "b": jnp.zeros((experts, r, m))}, pool)
        return pools, {}

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        assert isinstance(target, PooledTarget)
        if is_embedding(target.path) or is_convolution(target.path, len(target.layout.axes)):
            raise PeftError(
                f"lily: {target.path!r} is a lookup table or a convolution, and routers read the inputs of "
                "linear layers; exclude it"
            )
        bound = 1.0 / math.sqrt(target.rank)
        shape = (*target.stack, experts, target.rank)
        group = (target.first + jnp.arange(target.count, dtype=jnp.int32)) // stride
        router = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        return {"router": router}, {"group": group.reshape(target.stack), "on": jnp.ones(target.stack)}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> MappedRows:
        own = {name: slots[name] for name in ("router", "group", "on")}
        mix, pool = Mix(options.scale), of_pool(slots, target)
        return MappedRows(base, own, target.layout, mix, "beside", shared=pool)

    return of_weights("lily", options, start, weight, share=share, one_way=True)


@dataclass(frozen=True)
class Mix:
    """What one matrix adds, by a scale."""

    scale: float

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """The thin rows times the second factors, mixed by the mean of all rows' shares."""
        z = x @ slots["a"][slots["group"]].astype(x.dtype).T
        shares = jax.nn.softmax(z.astype(jnp.float32) @ slots["router"].T, axis=-1)
        mean = shares.mean(tuple(range(shares.ndim - 1)))
        b = slots["on"] * self.scale * jnp.einsum("e,ero->ro", mean, slots["b"])
        return z @ b.astype(x.dtype)
