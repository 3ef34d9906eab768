"""MonteCLoRA: LoRA that trains under noise of a learned size, drawn anew in each step.

Paper: Seth et al., "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
Adaptation", TMLR 2025, arXiv 2411.04358.

    y = x·W + s · (x·a'ᵀ)·b      a' = a + ε Σ_i w_i σ ∘ z_i      z_i ~ N(0, 1) [r, in], i = 1..N
    σ² = e^2t ∘ χ²_r [r]         w = softmax(μ + τ ∘ z)          μ, τ: of Dirichlet(e^c) in logarithms

Trained: a, b, t [r] and c [N], r·(in + out + 1) + N numbers a weight. Backward keeps x (shared) and x·a'ᵀ,
and draws the noise again. Without a key, and merged, it is LoRA. The optimizer adds the gradients of `kl`
times the weights' mean divergence from the priors of t and c; the loss that a step reports has no such term.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.scipy.special import digamma, gammaln

from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.methods._targets import Target, all_layers
from peftjax.methods.lowrank._options import LoraOptions
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.transform.around import Around, Own, require_together
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.derived import Drawn
from peftjax.weights.low_rank import LowRank

SMALLEST_VARIANCE, SMALLEST = 1e-3, 1e-6


@dataclass(frozen=True, kw_only=True)
class MontecloraOptions(LoraOptions):
    """Those of `lora`, and more.

    Attributes:
        samples: N, how many draws are mixed.
        noise: ε, the size of the noise.
        kl: of the divergences from the priors.
        concentration: of the prior of the mixture.
    """

    samples: int = 8
    noise: float = 1e-4
    kl: float = 1e-5
    concentration: float = 0.1

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "samples", self.samples)
        at_least(caller, "noise", self.noise, 0)
        at_least(caller, "kl", self.kl, 0)
        positive(caller, "concentration", self.concentration)


@register(
    kind="adapter",
    paper="MonteCLoRA, Seth et al. 2025, arXiv 2411.04358",
    trains="r·(in + out + 1) + N",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "samples": 3, "kl": 1.0}),
)
@takes(MontecloraOptions)
def monteclora(options: MontecloraOptions) -> Transform:
    """Low-rank adaptation under learned noise (arXiv 2411.04358).

    Raises:
        PeftError: as `lora`.
    """

    def priors(key: Array, target: Target, base: object) -> tuple[dict[str, Array], dict[str, Array]]:
        keys = jax.random.split(key)
        t = jax.random.uniform(keys[0], (*target.stack, target.rank))
        return {"t": t, "c": jax.random.uniform(keys[1], (*target.stack, options.samples))}, {}

    def noisy(target: Target, weight: LowRank, slots: Mapping[str, Array]) -> Drawn:
        own = {"a": weight.a, "b": weight.b, **{name: all_layers(slots[name], target) for name in ("t", "c")}}
        factors = Noisy(options.noise)
        return Drawn(weight.base, own, {}, weight.layout, factors, weight.scale, weight.dropout, weight.key)

    return low_rank(
        "monteclora",
        options,
        options.start,
        rslora=options.rslora,
        wrap=Wrap(noisy, priors),
        draws=True,
        around=Around(gradients=_penalize(options.kl, options.concentration)),
    )


@dataclass(frozen=True)
class Noisy:
    """The factors of a matrix, a with noise where there is a key."""

    size: float

    def __call__(
        self, shared: Mapping[str, Array], slots: Mapping[str, Array], key: Array | None
    ) -> tuple[Array, Array]:
        """`a'` and b."""
        a, b, t, c = (slots[name] for name in ("a", "b", "t", "c"))
        if key is None:
            return a, b
        keys = jax.random.split(jax.random.fold_in(key, 1), 3)
        chi_square = jax.random.chisquare(keys[0], a.shape[0], t.shape)
        mixed = mixture(c, jax.random.normal(keys[1], c.shape))
        z = jax.random.normal(keys[2], (*c.shape, *a.shape))
        noise = self.size * deviation(t, chi_square)[:, None] * jnp.tensordot(mixed, z, 1)
        return a + noise.astype(a.dtype), b


def deviation(t: Array, chi_square: Array) -> Array:
    """σ [r], the deviations of the noise in each direction of the rank."""
    return jnp.sqrt(jnp.maximum(jnp.exp(2.0 * t) * chi_square, SMALLEST_VARIANCE))


def mixture(c: Array, z: Array) -> Array:
    """The weights w [N], as of a Dirichlet distribution of concentrations `e^c`, from normal numbers z."""
    count, concentrations = c.shape[0], jnp.maximum(jnp.exp(c), SMALLEST)
    logarithms = jnp.log(concentrations)
    inverse = 1.0 / concentrations
    variance = inverse * (1.0 - 2.0 / count) + inverse.sum() / count**2
    spread = jnp.sqrt(jnp.maximum(variance, SMALLEST) + SMALLEST)
    return jax.nn.softmax(logarithms - logarithms.mean() + spread * z)


def divergence(t: Array, c: Array, concentration: float) -> Array:
    """The divergences from the priors of the noise of one matrix, those of σ in the mean over χ²."""
    (rank,), (count,) = t.shape, c.shape
    of_scale = 0.5 * rank * (jnp.sum(jnp.exp(2.0 * t) - 2.0 * t) - rank)
    # In the mean over χ², but for a constant: that of log χ².
    of_noise = 0.5 * count * jnp.sum(rank * jnp.exp(2.0 * t) - 2.0 * t - 1.0)
    own, prior = jnp.exp(c), concentration
    of_mixture = gammaln(own.sum()) - jnp.sum(gammaln(own)) - gammaln(count * prior)
    of_mixture += count * gammaln(prior) + jnp.sum((own - prior) * (digamma(own) - digamma(own.sum())))
    return of_scale + of_noise + of_mixture


def _penalize(kl: float, concentration: float) -> optax.GradientTransformationExtraArgs:
    """Add the gradients of `kl` times the mean of the divergences of all matrices."""

    def init(params: Own) -> optax.EmptyState:
        require_together("monteclora", params)
        return optax.EmptyState()

    def update(
        updates: Own, state: optax.EmptyState, params: Own | None = None, **extra: object
    ) -> tuple[Own, optax.EmptyState]:
        if params is None:
            raise PeftError(
                "monteclora: the update needs the parameters; call tx.update(grads, state, params)"
            )
        matrices = sum(math.prod(own["t"].shape[:-1]) for own in params.values() if "t" in own)

        def penalty(t: Array, c: Array) -> Array:
            flat = t.reshape(-1, t.shape[-1]), c.reshape(-1, c.shape[-1])
            each = jax.vmap(lambda t, c: divergence(t, c, concentration))(*flat)
            return kl / matrices * jnp.sum(each)

        new = {}
        for path, slots in updates.items():
            new[path] = dict(slots)
            if "t" in slots:
                added = jax.grad(penalty, (0, 1))(params[path]["t"], params[path]["c"])
                new[path] |= {n: slots[n] + own.astype(slots[n].dtype) for n, own in zip(("t", "c"), added)}
        return new, state

    return optax.GradientTransformationExtraArgs(init, update)
