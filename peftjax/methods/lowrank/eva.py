"""EVA: LoRA on the principal directions of what enters each weight, with ranks by the variance they explain.

Paper: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024, arXiv
2410.07170.

    covariance of x [in, in] = Σ_i λ_i v_i v_iᵀ      a = rows v_1 ... v_r'      b = 0      s = alpha / r

Of all directions of all weights, at most rho · r of each, the ones with the largest share λ_i / Σλ are taken,
as many as ranks of r come to; so a weight, or a layer of a stack, has a rank r' of its own, and one without
any is not adapted. The layers of a stack have arrays of the largest of their ranks, in which what is above
the layer's own stays zero. The scale does not depend on r'. Trained: r'·(in + out) numbers a weight. Backward
keeps what LoRA's does. `covariances` come from `peftjax.calibrate.input_statistics`. Default rho = 2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core.checks import at_least
from peftjax.core.errors import PeftError
from peftjax.core.targets import pattern_value
from peftjax.methods.lowrank._factors import ScaledTarget, start_uniform, zeros
from peftjax.methods.lowrank._from_data import FromDataOptions, require_data, statistics_of
from peftjax.methods.lowrank.lora import low_rank
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class EvaOptions(FromDataOptions):
    """Those of `lora` but `init` and `rslora`, and more.

    Attributes:
        covariances: of the inputs, `[*stack, in, in]` by path; the weights they are of are the targets.
        rho: the rank of a matrix is at most `rho · rank`; with 1 all have the same.
    """

    covariances: Mapping[str, jax.Array] | None = None
    rho: float = 2.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        at_least(caller, "rho", self.rho, 1.0)
        require_data(
            caller, self.loaded, "covariances", self.covariances, "peftjax.calibrate.input_statistics"
        )
        if not self.loaded and (self.targets, self.exclude, self.layers) != ("all-linear", None, None):
            raise PeftError(
                f"{caller}: the targets are those of the covariances; give targets and exclude to "
                "peftjax.calibrate.input_statistics"
            )


@register(
    kind="adapter",
    paper="EVA, Paischer et al. 2024, arXiv 2410.07170",
    trains="r'·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "loaded": True}),
)
@takes(EvaOptions)
def eva(options: EvaOptions) -> Transform:
    """Low-rank adaptation that starts from the variance of the inputs (arXiv 2410.07170).

    A saved method has `loaded=True`, its targets and ranks as patterns, and the start from its file.

    Raises:
        PeftError: as `lora`; here without covariances, or with targets beside them; in `init` for covariances
            that do not fit the parameters.
    """
    if options.covariances is None:
        return low_rank("eva", options, start_uniform, rslora=False)
    given = options.covariances
    ranks = shared_ranks(given, {path: _rank_of(path, options) for path in given}, options.rho)
    largest = {path: int(own.max()) for path, own in ranks.items() if own.max() > 0}
    settled: dict[str, Any] = {
        "targets": "|".join(map(re.escape, largest)),
        "exclude": None,
        "rank_pattern": {f"^{re.escape(path)}": rank for path, rank in largest.items()},
        "alpha_pattern": {
            f"^{re.escape(path)}": _alpha_of(path, options) * rank / _rank_of(path, options)
            for path, rank in largest.items()
        },
    }

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Any]:
        covariance = statistics_of("eva", "covariances", given, target, side="i")
        _, directions = principal(covariance, target.rank)
        held = jnp.arange(target.rank) < jnp.asarray(ranks[target.path])[..., None]
        return jnp.where(held[..., None], directions, 0.0), zeros(target)[1], leaf

    method = low_rank("eva", replace(options, **settled), start, rslora=False)
    return replace(method, config={**settled, "loaded": True})


def _rank_of(path: str, options: EvaOptions) -> int:
    return pattern_value(path, options.rank_pattern, options.rank)


def _alpha_of(path: str, options: EvaOptions) -> float:
    return pattern_value(path, options.alpha_pattern, options.alpha)


def shared_ranks(covariances: Mapping[str, Array], ranks: Mapping[str, int], rho: float) -> dict[str, Any]:
    """The rank of each matrix, `[*stack]` by path, their sum that of the given ranks of all matrices.

    Args:
        covariances: `[*stack, in, in]` by path.
        ranks: what each matrix would have with all alike, by path.
        rho: a matrix has at most so many times its own.
    """
    shares, owners = [], []
    budget = 0
    for number, (path, covariance) in enumerate(covariances.items()):
        most = min(round(ranks[path] * rho), covariance.shape[-1])
        values = np.asarray(principal(covariance, most)[0]).reshape(-1, most)
        shares.append(values.ravel())
        owners += [(number, matrix) for matrix in range(len(values)) for _ in range(most)]
        budget += ranks[path] * len(values)
    order = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
    found = {path: np.zeros(covariance.shape[:-2], int) for path, covariance in covariances.items()}
    paths = list(found)
    for place in order:
        number, matrix = owners[place]
        found[paths[number]].reshape(-1)[matrix] += 1
    return found


def principal(covariance: Array, count: int) -> tuple[Array, Array]:
    """The largest shares of the variance `[*stack, count]`, and their directions `[*stack, count, in]`.

    The largest entry of a direction is positive.
    """
    values, vectors = jnp.linalg.eigh(covariance.astype(jnp.float32))
    total = jnp.maximum(values.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    directions = vectors[..., ::-1][..., :count].swapaxes(-1, -2)
    at = jnp.argmax(jnp.abs(directions), axis=-1, keepdims=True)
    signs = jnp.sign(jnp.take_along_axis(directions, at, axis=-1))
    return values[..., ::-1][..., :count] / total, directions * signs
