"""Any optimizer on low-rank projections of the gradients: GaLore's projection as an optax transformation.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv
2403.03507. Of every targeted matrix with gradient G [in, out], at steps 0, T, 2T, ...

    P = the first r singular vectors of G's smaller side

and at every step, with a transformation `inner` (Adam's, say) that sees R and has states of its size,

    R = P G     N = inner(R)     update = scale · Pᵀ N          (or R = P Gᵀ, see `refresh`)

All other parameters go through `inner` as they are, without the scale. States: P, r · min(in, out) numbers a
matrix, and what `inner` keeps for r · max(in, out). The gradient that comes in is a whole one. A refresh
needs a decomposition's workspace: `docs/guides/optimizers.md` says how to keep it out of the other steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from peftjax.core import tree
from peftjax.core.checks import one_of
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets
from peftjax.optim import refresh as of
from peftjax.optim.rotation import Moments, follow_bases, gradient_sums, require_rotatable
from peftjax.optim.updates import is_placeholder
from peftjax.transform.moments import Path
from peftjax.weights.canonical import to_canonical, to_logical


class ProjectionState(NamedTuple):
    """The state of `project`; `optax.tree.map_params` treats `bases` as belonging to no parameter."""

    count: Array
    """Steps done, int32 `[]`."""
    bases: dict[str, of.Bases]
    """By path and side, `[*stack, r, in]` or `[*stack, r, out]`; zero before the first refresh."""
    inner: optax.OptState
    """Of the parameters' structure, with `[*stack, r, ...]` instead of projected ones."""


def project(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    every: int = 200,
    scale: ArrayLike = 0.25,
    side: of.Compressed = "smaller",
    basis: of.Method = "auto",
    signs: of.Signs = "largest",
    moments: Moments = "keep",
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    layouts: Mapping[str, str] | None = None,
    dtype: DTypeLike = "float32",
    strict: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on low-rank projections of the targeted gradients (equations above).

    Its update takes `refresh`: True or False, known when the program is made, for a program with a refresh
    or without one (the first step needs one); None (the default) refreshes by the step count.

    Args:
        inner: the transformation of the projected gradients. It is given the shapes of projected parameters
            (those of R) and no values: chain weight decay after `project`.
        rank: r; of smaller matrices, their smaller side.
        every: T, steps between two refreshes.
        scale: of the updates of projected matrices.
        side: which side is compressed: the 'smaller', 'larger', 'input', 'output', or 'both' (R is r x r). Of
            a square matrix 'smaller' and 'larger' are both the input; the released `reverse_std`
            compresses its output.
        basis: how it is found: 'svd', 'gram', 'subspace', or 'auto' by size, see `refresh`.
        signs: of the rows of a basis: 'largest' makes the largest entry of each positive, as `pj.galore`
            does, so that kept moments do not depend on the machine; 'decomposition' leaves them, as released.
        moments: what a refresh does to those of `inner`: 'keep' (as released), 'reset' or 'rotate'.
        targets: as in `lora`; matrices only, every matrix of a stack has a basis of its own.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layouts: axes by pattern.
        dtype: of the bases, and of the projected gradients that `inner` sees.
        strict: refuse parameters in which 'all-linear' finds no matrix; by default they go through `inner`.

    Raises:
        PeftError: here for an option out of range; in `init` for targets that match nothing or states that
            cannot rotate; in `update` for a traced `refresh` or an `inner` that reads projected parameters.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.project(optax.adam(1e-2), rank=2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    of.require_options(rank, every, side, basis, signs)
    one_of("project", "moments", moments, get_args(Moments))
    inner = optax.with_extra_args_support(inner)

    def find(params: Any) -> dict[str, of.Projected]:
        return of.find_projected(params, rank, side, targets, exclude, layouts, strict)

    def init(params: Any) -> ProjectionState:
        if is_placeholder(params):
            nothing = jnp.zeros([], jnp.int32)
            return ProjectionState(nothing, nothing, inner.init(params))
        found = find(params)
        if moments != "keep" and "" in found:
            raise PeftError(f"project: moments={moments!r} needs the parameters in a tree, such as a dict")
        small = _small(params, found, dtype)
        state = inner.init(small)
        if moments == "rotate":
            require_rotatable(state, _places(params, found), found, dtype)
        bases = {path: of.zero_bases(leaf, dtype) for path, leaf in found.items()}
        return ProjectionState(jnp.zeros([], jnp.int32), bases, state)

    def update(
        grads: Any, state: ProjectionState, params: Any = None, *, refresh: bool | None = None, **extra: Any
    ) -> tuple[Any, ProjectionState]:
        _require_static(refresh)
        found, leaves = find(grads), tree.named_leaves(grads)
        matrices = {path: to_canonical(leaves[path], leaf.layout) for path, leaf in found.items()}

        def refreshed(old: dict[str, of.Bases], inner_state: Any) -> tuple[dict[str, of.Bases], Any]:
            seen = dict(matrices)
            for path, total in gradient_sums(inner_state, _places(grads, found)).items():
                seen[path] = seen[path] + of.back(total, old[path]).astype(seen[path].dtype)
            new = {
                path: of.refreshed_bases(seen[path], leaf, old[path], basis, state.count, signs)
                for path, leaf in found.items()
            }
            return new, follow_bases(inner_state, moments, _places(grads, found), old, new)

        bases, inner_state = state.bases, state.inner
        if refresh is None:
            due = state.count % every == 0
            bases, inner_state = lax.cond(due, refreshed, lambda *kept: kept, bases, inner_state)
        elif refresh:
            bases, inner_state = refreshed(bases, inner_state)
        projected = {path: of.project(matrices[path], bases[path]).astype(dtype) for path in found}
        known = _known(grads if params is None else params, found, dtype)
        updates, inner_state = _inner_update(inner, tree.replace(grads, projected), inner_state, known, extra)

        def full(path: str, leaf: Array) -> Array:
            if path not in found:
                return leaf
            whole = to_logical(scale * of.back(leaf, bases[path]), found[path].layout)
            return whole.astype(leaves[path].dtype)

        count = optax.safe_increment(state.count)
        return tree.map_named(full, updates), ProjectionState(count, bases, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _small(params: Any, found: Mapping[str, of.Projected], dtype: DTypeLike) -> Any:
    """The parameters with zeros of the projected shape instead of projected ones."""
    return tree.replace(params, {path: jnp.zeros(leaf.shape, dtype) for path, leaf in found.items()})


def _places(params: Any, found: Mapping[str, of.Projected]) -> dict[str, Path]:
    """The way to each projected parameter."""
    ways = tree.keys_of(params)
    return {path: ways[path] for path in found}


def _require_static(refresh: Any) -> None:
    if refresh is not None and not isinstance(refresh, bool):
        raise PeftError(
            "project: refresh must be True, False or None, known when the program is made; "
            "name it in static_argnames of jax.jit"
        )


def _known(params: Any, found: Mapping[str, of.Projected], dtype: DTypeLike) -> Any:
    """The parameters as `inner` is given them: of projected ones the shapes alone."""
    return tree.replace(
        params, {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in found.items()}
    )


def _inner_update(
    inner: optax.GradientTransformationExtraArgs,
    grads: Any,
    state: Any,
    params: Any,
    extra: Mapping[str, Any],
) -> tuple[Any, Any]:
    try:
        return inner.update(grads, state, params, **extra)
    except (TypeError, AttributeError, ValueError) as error:
        if "ShapeDtypeStruct" not in str(error):
            raise
        raise PeftError(
            "project: the inner transformation reads the values of projected parameters, and has only their "
            "shapes; chain weight decay and the like after project"
        ) from error
