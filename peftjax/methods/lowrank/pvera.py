"""PVeRA: VeRA whose inner numbers are drawn from a normal distribution while it is trained.

Paper: "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", 2025, arXiv 2512.07703.

    μ, log σ² = the halves of d ∘ (x·Aᵀ)     A [2r, in], d [2r]
    y = x·W + c ∘ (z·B)                      B [r, out], c [out];  z = μ + ε σ, ε ~ N(0, 1) for each token
                                             in training, and z = μ without a key

Trained: d and c, 2r + out numbers a weight, float32; d = 0.1 and c = 0 at first. A and B are as VeRA's, drawn
once for the model. Backward keeps x, which the layer shares with its neighbors; the noise is drawn again from
the key. Merged, and in evaluation, it is VeRA with the first half of A.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.core.naming import is_embedding
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank.vera import Scaled, VeraOptions, random_factors
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.derived import Derived
from peftjax.weights.mapped import Mapped


@register(
    kind="adapter",
    paper="PVeRA, 2025, arXiv 2512.07703",
    trains="2r + out",
    backward_keeps="the input x (shared) in training",
    conformance=Conformance(example={"rank": 4, "targets": ".*kernel"}),
)
@takes(VeraOptions)
def pvera(options: VeraOptions) -> Transform:
    """Train the scales of one random pair of factors, by samples of the inner numbers (arXiv 2512.07703).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, or a
            lookup table among them.
    """
    rank = options.rank

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        return {}, random_factors(key, targets, 2 * rank, rank)

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        if is_embedding(target.path):
            raise PeftError(
                f"pvera: {target.path!r} is a lookup table, whose rows no input scales; exclude it"
            )
        d = jnp.full((*target.stack, 2 * rank), options.d, jnp.float32)
        return {"d": d, "c": jnp.zeros((*target.stack, target.layout.matrix[1]))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Weight:
        layout, shared = target.layout, {name: slots[name] for name in ("a", "b")}
        if keys is None:
            means = {"d": slots["d"][..., :rank], "c": slots["c"]}
            return Derived(base, means, {**shared, "a": shared["a"][:rank]}, layout, Scaled(*layout.matrix))
        drawn = jax.vmap(jax.random.split)(keys.reshape(-1)).reshape(*layout.stack, 2)
        own = {"d": slots["d"], "c": slots["c"], "key": drawn[..., 0]}
        sampled = Sampled(*layout.matrix)
        return Mapped(base, own, layout, sampled, "beside", options.dropout, drawn[..., 1], shared)

    return of_weights("pvera", options, start, weight, share=share, draws=True, one_way=True)


@dataclass(frozen=True)
class Sampled:
    """What one matrix `[n, m]` adds in training."""

    n: int
    m: int

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """A sample for each row of x."""
        a, b = slots["a"][:, : self.n].astype(x.dtype), slots["b"][:, : self.m] * slots["c"]
        mean, log_variance = jnp.split((x @ a.T).astype(jnp.float32) * slots["d"], 2, axis=-1)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(slots["key"], mean.shape)
        return z.astype(x.dtype) @ b.astype(x.dtype)
