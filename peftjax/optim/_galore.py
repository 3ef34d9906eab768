"""GaLore: AdamW with its moments in a low-rank subspace of each gradient matrix, refreshed every T steps.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv
2403.03507. With P and R = P G of `peftjax.optim.projection`, at step t = 1, 2, ... for projected matrices

    m ← b1 m + (1 - b1) R     v ← b2 v + (1 - b2) R²     N = m / (√v + eps)
    W ← W - lr √(1 - b2ᵗ) / (1 - b1ᵗ) scale Pᵀ N
    W ← W - lr wd W                                        with the W of the line before

and the same with P = I and scale 1 for all others: the learning rate of a projected matrix is scale · lr, its
decay is not scaled. `order='optax'` has eps inside the bias correction, √(v / (1 - b2ᵗ)) + eps, and decays
the W before the step, as `optax.adamw`. Kept per matrix: r · min(in, out) numbers of P and 2 r · max(in, out)
moments, instead of Adam's 2 · in · out. Defaults are the released code's (T = 200, scale = 0.25, eps = 1e-6);
differences from it: `docs/guides/optimizers.md`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax
from jax.typing import ArrayLike, DTypeLike

from peftjax.core.checks import one_of
from peftjax.core.targets import Targets
from peftjax.optim._adamw import decay_updated_weights, scale_by_released_adam
from peftjax.optim.projection import project
from peftjax.optim.refresh import Compressed, Method, Signs
from peftjax.optim.rotation import Moments

Order = Literal["released", "optax"]
Mask = Any | Callable[[Any], Any] | None


def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int,
    every: int = 200,
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    decay_mask: Mask = None,
    order: Order = "released",
    side: Compressed = "smaller",
    basis: Method = "auto",
    signs: Signs = "largest",
    moments: Moments = "keep",
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    layouts: Mapping[str, str] | None = None,
    dtype: DTypeLike = "float32",
    strict: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on projected gradients (equations above, arXiv 2403.03507).

    Its update needs the parameters and takes `refresh`, see `project`, which has the other options.

    Args:
        learning_rate: a number or a schedule.
        rank: r.
        every: T, steps between two refreshes.
        scale: of the steps of projected matrices.
        b1: decay of the average gradient.
        b2: decay of the average squared gradient.
        eps: added to √v; by default 1e-6, and 1e-8 for the order of optax.
        weight_decay: wd.
        decay_mask: which parameters decay, as in optax; all of them by default.
        order: 'released' or 'optax', of eps and decay.
        side: which side of each matrix is compressed, see `project`.
        basis: how a basis is found, see `project`.
        signs: of the rows of a basis, see `project`.
        moments: what a refresh does to m and v: 'keep', 'rotate' or 'reset'.
        targets: the matrices to project; all other parameters have plain Adam.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layouts: axes by pattern.
        dtype: of P, m and v.
        strict: refuse parameters in which 'all-linear' finds no matrix; by default all have plain Adam.

    Raises:
        PeftError: as `project`, or the order is neither.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.galore(1e-2, rank=2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    tx = project(
        scale_by_adam(b1, b2, eps, order),
        rank=rank,
        every=every,
        scale=scale,
        side=side,
        basis=basis,
        signs=signs,
        moments=moments,
        targets=targets,
        exclude=exclude,
        layouts=layouts,
        dtype=dtype,
        strict=strict,
    )
    return step_and_decay(tx, learning_rate, weight_decay, decay_mask, order)


def scale_by_adam(
    b1: ArrayLike, b2: ArrayLike, eps: ArrayLike | None, order: Order
) -> optax.GradientTransformation:
    """Adam in one of the two orders; eps is by default the usual one of that order.

    Args:
        b1: decay of the average gradient.
        b2: decay of the average squared gradient.
        eps: by default 1e-6, and 1e-8 for the order of optax.
        order: 'released' or 'optax'.

    Raises:
        PeftError: the order is neither.
    """
    if order == "optax":
        return optax.scale_by_adam(b1, b2, 1e-8 if eps is None else eps)
    one_of("galore", "order", order, ("released", "optax"))
    return scale_by_released_adam(b1, b2, 1e-6 if eps is None else eps)


def step_and_decay(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike,
    decay_mask: Mask,
    order: Order,
) -> optax.GradientTransformationExtraArgs:
    """`tx`, then learning rate and weight decay in one of the two orders.

    Args:
        tx: from gradients to directions.
        learning_rate: a number or a schedule.
        weight_decay: wd.
        decay_mask: which parameters decay, as in optax.
        order: 'released' (decay of the updated weights) or 'optax' (of those before the step).
    """
    rate = optax.scale_by_learning_rate(learning_rate)
    if order == "optax":
        return optax.chain(tx, optax.add_decayed_weights(weight_decay, decay_mask), rate)
    decay = decay_updated_weights(learning_rate, weight_decay)
    return optax.chain(tx, rate, decay if decay_mask is None else optax.masked(decay, decay_mask))
