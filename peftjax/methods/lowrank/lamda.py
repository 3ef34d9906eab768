"""LaMDA: a small core trained between two frozen projections, the second of which is trained for a while.

Paper: Azizi et al., "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
Findings of EMNLP 2024, arXiv 2406.12832.

    y = x·W + alpha/r · (x·aᵀ)·(S·b)        a [r, in], b [r, out] the first singular directions of W, S [r, r]
    row i of b is trained for the first η·T·(i + 1)/r steps of T, so that the first directions stop first

Trained: S, r² numbers a weight, zero at first, and r·out for b, float32; with η = 0 b is frozen from the
start and costs no optimizer state. Backward keeps x·aᵀ, r numbers a token, and not x. With `ranks` (LaMDA++)
each matrix has one of these as its r: the larger, the smaller the share of Σσ² in its first max(ranks) ones.
The defaults of η, r and alpha are the released scripts'.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from peftjax.core.checks import fraction, positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._base import base_matrices, principal
from peftjax.methods.lowrank._ranks import KEPT
from peftjax.transform.around import Around, Own, require_given
from peftjax.transform.frozen import Frozen, Params
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Both, Transform
from peftjax.weights.low_rank import LowRank

ENERGY = "energy"
"""The share of Σσ² in the directions of a matrix, of LaMDA++, `[*stack]`."""


@dataclass(frozen=True, kw_only=True)
class LamdaOptions(DropoutOptions, RankOptions):
    """Those of `lamda`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        ranks: of LaMDA++, the values that r has instead, each for an equal number of matrices.
        alpha: numerator of the scale.
        unfrozen: η, the share of the training for which rows of b are trained.
        total_steps: T, optimizer steps of the training; not needed where η is 0.
    """

    rank: int = 64
    ranks: Sequence[int] | None = None
    alpha: float = 16.0
    unfrozen: float = 0.3
    total_steps: int | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)
        fraction(caller, "unfrozen", self.unfrozen)
        positive(caller, "total_steps", self.total_steps)
        if self.ranks is not None:
            if not self.ranks:
                raise PeftError(f"{caller}: ranks is empty; give the values that r may have, or None")
            if self.rank_pattern:
                raise PeftError(f"{caller}: ranks follow from the weights; leave rank_pattern out")
            for rank in self.ranks:
                positive(caller, "ranks", rank)
        if self.unfrozen > 0.0 and self.total_steps is None:
            raise PeftError(
                f"{caller}: give total_steps, of which b is trained for {self.unfrozen}, or unfrozen=0"
            )


@register(
    kind="adapter",
    paper="LaMDA, Azizi et al. 2024, arXiv 2406.12832",
    trains="r² + r·out for a while",
    backward_keeps="x·aᵀ",
    of_steps=lambda steps: {"total_steps": steps},
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "total_steps": 50}),
)
@takes(LamdaOptions)
def lamda(options: LamdaOptions) -> Transform:
    """Train a core between the first singular directions of the targeted weights (arXiv 2406.12832).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """
    steps, ranks = options.unfrozen * (options.total_steps or 0), options.ranks

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        w = base_matrices(target, base)
        svd = principal(w, target.rank)
        trained, kept = {"core": jnp.zeros((*target.stack, target.rank, target.rank))}, {}
        (trained if steps > 0.0 else kept)["b"] = svd.vt
        if ranks is not None:
            kept[ENERGY] = jnp.square(svd.sizes).sum(axis=-1) / jnp.square(w).sum(axis=(-1, -2))
        return trained, {**kept, "a": svd.u.swapaxes(-1, -2)}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> LowRank:
        core, scale = slots["core"], options.alpha / target.rank
        if ranks is not None:
            held = slots[KEPT].astype(core.dtype)
            own = target.rank / jnp.maximum(held.sum(axis=-1), 1.0)
            core = core * held[..., :, None] * held[..., None, :] * own[..., None, None]
        dropout = options.dropout if keys is not None else 0.0
        return LowRank(base, slots["a"], core @ slots["b"], target.layout, scale, dropout, keys)

    freeze = freeze_in_turn(steps, ranked=ranks is not None)
    method = of_weights(
        "lamda",
        options if ranks is None else replace(options, rank=max(ranks)),
        start,
        weight,
        dropout=options.dropout,
        around=Around(freeze, freeze) if steps > 0.0 else None,
    )
    return method if ranks is None else replace(method, init=with_ranks(method.init, ranks))


def with_ranks(init: Callable[..., Both], ranks: Sequence[int]) -> Callable[..., Both]:
    """`init`, and of each matrix which directions it has, by its place in the order of all energies."""
    falling = np.sort(ranks)[::-1]

    def ranked(key: Array, params: Params) -> Both:
        frozen, trainable = init(key, params)
        state = {path: dict(slots) for path, slots in frozen.state.items()}
        energies = {path: slots.pop(ENERGY) for path, slots in state.items()}
        flat = jnp.concatenate([energy.reshape(-1) for energy in energies.values()])
        places = jnp.argsort(jnp.argsort(flat, stable=True))
        own = jnp.asarray(falling)[places * len(ranks) // len(flat)]
        ends = np.cumsum([energy.size for energy in energies.values()])[:-1]
        for (path, energy), part in zip(energies.items(), jnp.split(own, ends)):
            state[path][KEPT] = jnp.arange(falling[0]) < part.reshape(energy.shape)[..., None]
        return replace(frozen, state=state), trainable

    return ranked


def freeze_in_turn(steps: float, *, ranked: bool) -> optax.GradientTransformationExtraArgs:
    """Zero what belongs to row i of each b after `steps · (i + 1) / r` updates.

    Args:
        steps: ηT.
        ranked: whether r is a matrix's own, read in `frozen`.
    """

    def update(
        updates: Own, count: Array, params: Own | None = None, *, frozen: Frozen | None = None, **extra: Any
    ) -> tuple[Own, Array]:
        state = require_given("lamda", params, frozen).state if ranked else {}

        def left(path: str, b: Array) -> Array:
            rank = state[path][KEPT].sum(axis=-1, keepdims=True) if ranked else b.shape[-2]
            going_on = count < steps * (jnp.arange(b.shape[-2]) + 1) / rank
            return jnp.where(going_on[..., None], b, jnp.zeros_like(b))

        new = {
            path: {
                name: left(path, value) if name == "b" and not isinstance(value, optax.MaskedNode) else value
                for name, value in slots.items()
            }
            for path, slots in updates.items()
        }
        return new, optax.safe_increment(count)

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)
