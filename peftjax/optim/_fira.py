"""Fira: GaLore's AdamW, and beside it what the projection leaves out of each gradient.

Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", 2024, arXiv
2410.01623. With P, R = P G and N = m / (√v + eps) as in `peftjax.optim.galore`, and k a column of R and N, so
one of the numbers along the side that is not compressed,

    φ_k = ‖N_k‖ / (‖R_k‖ + 1e-8)      S = φ ∘ (G - scale Pᵀ R)
    S ← S · ‖S‖_before growth / ‖S‖   where ‖S‖ is above growth times that of the step before, ‖S‖_before
    W ← W - lr √(1 - b2ᵗ) / (1 - b1ᵗ) (scale Pᵀ N + S)

Kept per matrix: GaLore's state and ‖S‖. The whole gradient is needed: there is no form of it that trains in
the projection as `pj.galore` does. Equations and defaults are the released code's (T = 200, scale = 1,
growth = 1.01, eps = 1e-6; its scripts for pre-training have scale = 0.25).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from peftjax.core import tree
from peftjax.core.checks import at_least, positive
from peftjax.core.targets import Targets
from peftjax.optim import refresh as of
from peftjax.optim._adamw import scale_by_released_adam
from peftjax.optim._galore import Mask, step_and_decay
from peftjax.optim.adam_moments import correction
from peftjax.optim.projection import ProjectionState, project
from peftjax.optim.updates import is_placeholder
from peftjax.weights.canonical import to_canonical, to_logical

_TINY = 1e-8


class FiraState(NamedTuple):
    """The state of `fira` before its learning rate."""

    projection: ProjectionState
    """GaLore's."""
    sizes: Any
    """‖S‖ of the step before, float32 `[*stack]` by path; 0 before the first."""


def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int,
    every: int = 200,
    scale: float = 1.0,
    growth: float = 1.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    decay_mask: Mask = None,
    side: of.Compressed = "smaller",
    basis: of.Method = "auto",
    signs: of.Signs = "largest",
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    layouts: Mapping[str, str] | None = None,
    dtype: DTypeLike = "float32",
    strict: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on projected gradients, with the rest of each gradient scaled to it (arXiv 2410.01623).

    Its update takes `refresh`, see `project`, which has the other options.

    Args:
        learning_rate: a number or a schedule.
        rank: r.
        every: T, steps between two refreshes.
        scale: of the steps in the projection.
        growth: how many times larger S may be than in the step before, at least 1.
        b1: decay of the average gradient.
        b2: decay of the average squared gradient.
        eps: added to √v.
        weight_decay: of the updated weights, times the learning rate.
        decay_mask: which parameters decay, as in optax; all of them by default.
        side: which side of each matrix is compressed, see `project`; not 'both'.
        basis: how a basis is found, see `project`.
        signs: of the rows of a basis, see `project`.
        targets: the matrices to project; all other parameters have plain Adam.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layouts: axes by pattern.
        dtype: of P, m and v.
        strict: as of `galore`.

    Raises:
        PeftError: as `project`, or for a number out of range.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.fira(1e-2, rank=2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    positive("fira", "scale", scale)
    at_least("fira", "growth", growth, 1.0)
    of.require_one_side("fira", side)
    where = {"targets": targets, "exclude": exclude, "layouts": layouts, "strict": strict}
    adam = scale_by_released_adam(b1, b2, eps)
    tx = project(
        adam, rank=rank, every=every, scale=scale, side=side, basis=basis, signs=signs, dtype=dtype, **where
    )

    def find(params: Any) -> dict[str, of.Projected]:
        return of.find_projected(params, rank, side, **where)

    def init(params: Any) -> FiraState:
        if is_placeholder(params):
            return FiraState(tx.init(params), jnp.zeros([]))  # what `optax.tree_map_params` asks for
        zeros = {path: jnp.zeros(leaf.layout.stack, jnp.float32) for path, leaf in find(params).items()}
        return FiraState(tx.init(params), zeros)

    def update(grads: Any, state: FiraState, params: Any = None, **extra: Any) -> tuple[Any, FiraState]:
        updates, projection = tx.update(grads, state.projection, params, **extra)
        count = projection.count
        corrected = jnp.sqrt(correction(b2, count)) / correction(b1, count)
        steps, gradients = tree.named_leaves(updates), tree.named_leaves(grads)
        changed, sizes = {}, {}
        for path, leaf in find(grads).items():
            g, step = (to_canonical(t[path], leaf.layout).astype(jnp.float32) for t in (gradients, steps))
            bases = projection.bases[path]
            normed = of.project(step, bases) / (scale * corrected)
            rest, sizes[path] = _rest(g, bases, normed, scale, growth, state.sizes[path], count)
            whole = to_logical(step + corrected * rest, leaf.layout)
            changed[path] = whole.astype(steps[path].dtype)
        return tree.replace(updates, changed), FiraState(projection, sizes)

    whole = optax.GradientTransformationExtraArgs(init, update)
    return step_and_decay(whole, learning_rate, weight_decay, decay_mask, "released")


def _rest(
    g: Array, bases: of.Bases, normed: Array, scale: float, growth: float, before: Array, count: Array
) -> tuple[Array, Array]:
    """S `[*stack, in, out]` of a gradient, and its norm `[*stack]`.

    Args:
        g: the gradient, `[*stack, in, out]`.
        bases: of one side.
        normed: N, `[*stack, r, kept side]`.
        scale: of the steps in the projection.
        growth: how much larger S may be than before.
        before: ‖S‖ of the step before.
        count: t; the first step has nothing to be compared with.
    """
    projected = of.project(g, bases)
    factor = jnp.linalg.norm(normed, axis=-2) / (jnp.linalg.norm(projected, axis=-2) + _TINY)
    factor = factor[..., None, :] if "input" in bases else factor[..., :, None]
    rest = factor * (g - scale * of.back(projected, bases))
    size = jnp.sqrt(jnp.square(rest).sum(axis=(-1, -2)))
    limiter = jnp.where(count > 1, jnp.maximum(size / (before + _TINY) / growth, 1.0), 1.0)
    return rest / limiter[..., None, None], size / limiter
