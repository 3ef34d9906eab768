"""Natural GaLore: projected gradients times the inverse of an empirical Fisher matrix, before Adam.

Das, "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning", 2024, arXiv
2410.16029. For every matrix, H [k, s] holds the last s projected gradients of k numbers, the current g among
them, and

    g~ = (λ I + H Hᵀ)⁻¹ g = H c,     (λ I + Hᵀ H) c = e_g

H is a ring of s slots, zero at first: empty slots change nothing. Hᵀ H changes in one row a step and is kept,
so that a step costs 4 k s FLOPs and a Cholesky of s x s. λ is at least 1e-6 of the trace of Hᵀ H. Kept per
projected matrix of k numbers: s k of H and s² of Hᵀ H, beside GaLore's; `history_dtype=bfloat16` halves the
bytes of H. Variants: 'paper' projects one side (k = r · max(in, out)), 'released' both (k = r²). s = 20 and
λ = 1e-3 are fixed in the released code. Accuracy and memory: `docs/guides/optimizers.md`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from peftjax.core import tree
from peftjax.core.checks import at_least, one_of, positive
from peftjax.core.targets import Targets
from peftjax.optim._galore import Mask, Order, scale_by_adam, step_and_decay
from peftjax.optim.matrices import select_matrices
from peftjax.optim.projection import project
from peftjax.optim.refresh import Method, Signs
from peftjax.optim.updates import require_known

_FLOOR = 1e-6
_SMALLEST = 1e-45
"""The smallest positive number of float32."""


class NaturalState(NamedTuple):
    """The state of `scale_by_natural_gradient`."""

    count: Array
    """Steps done, int32 `[]`; the next gradient goes to slot count mod s."""
    history: Any
    """H of every leaf, `[*stack, s, ...]`."""
    gram: Any
    """Hᵀ H of every leaf, `[*stack, s, s]`, float32."""


def scale_by_natural_gradient(
    history: int = 20,
    damping: ArrayLike = 1e-3,
    dtype: DTypeLike | None = None,
    stack_of: Callable[[str, Any], int] | None = None,
) -> optax.GradientTransformation:
    """Multiply every gradient by `(λ I + H Hᵀ)⁻¹`, H its own last gradients (arXiv 2410.16029).

    Args:
        history: s, how many gradients are remembered, the current one included.
        damping: λ.
        dtype: of H; by default the parameter's.
        stack_of: how many leading axes of a leaf, given by path, are stacked matrices, each of which has a
            history of its own; by default all but the last two.

    Raises:
        PeftError: history or damping are not positive.
    """
    require_known("natural gradient", history=history)
    positive("natural gradient", "history", history)
    at_least("natural gradient", "damping", damping, _SMALLEST)

    def axes(path: str, leaf: Any) -> int:
        return max(leaf.ndim - 2, 0) if stack_of is None else stack_of(path, leaf)

    def init(params: Any) -> NaturalState:
        def slots(path: str, leaf: Array) -> Array:
            n = axes(path, leaf)
            return jnp.zeros((*leaf.shape[:n], history, *leaf.shape[n:]), dtype or leaf.dtype)

        def gram(path: str, leaf: Array) -> Array:
            return jnp.zeros((*leaf.shape[: axes(path, leaf)], history, history), jnp.float32)

        zeros = tree.map_named(slots, params), tree.map_named(gram, params)
        return NaturalState(jnp.zeros([], jnp.int32), *zeros)

    def update(grads: Any, state: NaturalState, params: Any = None) -> tuple[Any, NaturalState]:
        slot = state.count % history
        paths = tree.map_named(lambda path, _: path, grads)

        def one(path: str, g: Array, held: Array, gram: Array) -> tuple[Array, Array, Array]:
            step = _step
            for _ in range(axes(path, g)):
                step = jax.vmap(step, in_axes=(0, 0, 0, None, None))
            return step(g, held, gram, slot, damping)

        if not jax.tree.leaves(grads):  # everything is masked
            return grads, state._replace(count=optax.safe_increment(state.count))
        found = jax.tree.map(one, paths, grads, state.history, state.gram)
        outer, inner = jax.tree.structure(grads), jax.tree.structure((0, 0, 0))
        updates, held, gram = jax.tree.transpose(outer, inner, found)
        return updates, NaturalState(optax.safe_increment(state.count), held, gram)

    return optax.GradientTransformation(init, update)


def _step(g: Array, held: Array, gram: Array, slot: Array, damping: ArrayLike) -> tuple[Array, Array, Array]:
    """g~, H and Hᵀ H after a gradient of one matrix; `held [s, ...]`, `gram [s, s]`."""
    held = held.at[slot].set(g.astype(held.dtype))
    each = tuple(range(1, held.ndim))
    columns = held.astype(jnp.float32)
    product = lax.Precision.HIGHEST
    row = jnp.tensordot(columns, columns[slot], (each, tuple(range(g.ndim))), precision=product)
    gram = gram.at[slot].set(row).at[:, slot].set(row)
    floor = jnp.maximum(damping, _FLOOR * jnp.trace(gram))
    size = gram.shape[0]
    factor = jax.scipy.linalg.cho_factor(gram + floor * jnp.eye(size), lower=True)
    mixed = jax.scipy.linalg.cho_solve(factor, jax.nn.one_hot(slot, size))
    return jnp.tensordot(mixed, columns, (0, 0), precision=product).astype(g.dtype), held, gram


def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int,
    variant: Literal["paper", "released"] = "paper",
    history: int = 20,
    damping: ArrayLike = 1e-3,
    history_dtype: DTypeLike | None = None,
    every: int = 200,
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    decay_mask: Mask = None,
    order: Order = "released",
    basis: Method = "auto",
    signs: Signs = "largest",
    moments: Literal["keep", "reset"] = "keep",
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    layouts: Mapping[str, str] | None = None,
    dtype: DTypeLike = "float32",
    strict: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """GaLore with the natural gradient of the projected matrices (equations above, arXiv 2410.16029).

    Args:
        learning_rate: a number or a schedule.
        rank: r.
        variant: 'paper' projects the smaller side, 'released' both.
        history: s, how many gradients are remembered; as `rank`, static under `optax.inject_hyperparams`.
        damping: λ.
        history_dtype: of H; by default `dtype`.
        every: T, steps between two refreshes.
        scale: of the steps of projected matrices.
        b1: decay of the average of g~.
        b2: decay of the average of g~².
        eps: added to √v.
        weight_decay: wd.
        decay_mask: which parameters decay.
        order: 'released' or 'optax', of eps and decay.
        basis: how a basis is found, see `project`.
        signs: of the rows of a basis, see `project`.
        moments: what a refresh does to m, v and H: 'keep' or 'reset'.
        targets: the matrices to project; all other parameters have plain Adam.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layouts: axes by pattern.
        dtype: of the bases, m and v.
        strict: refuse parameters in which 'all-linear' finds no matrix.

    Raises:
        PeftError: as `galore`, or the variant is neither.
    """
    one_of("natural_galore", "variant", variant, ("paper", "released"))

    def of_projected(params: Any) -> Any:
        paths = select_matrices(params, targets, caller="natural_galore", exclude=exclude, strict=strict)
        return tree.map_named(lambda path, _: path in paths, params)

    natural = optax.masked(scale_by_natural_gradient(history, damping, history_dtype), of_projected)
    tx = project(
        optax.chain(natural, scale_by_adam(b1, b2, eps, order)),
        rank=rank,
        every=every,
        scale=scale,
        side="smaller" if variant == "paper" else "both",
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
