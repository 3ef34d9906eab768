"""NaP: normalize and project, every weight matrix put back on the sphere of its first norm after each step.

"Normalization and Effective Learning Rates in Reinforcement Learning", Lyle et al., NeurIPS 2024, arXiv
2407.01800 (no released code). For every matrix W `[in, out]` of a stack and an optimizer's update u,

    ρ = ‖W‖_F before the first step                W ← ρ (W + u) / ‖W + u‖_F

The network must have a normalization after every linear layer, and no bias before it. What is projected:
linear weights; not the readout, embeddings and convolutions unless named, vectors, factors of adapters, or a
matrix that starts as zero. `norms` names norms whose scale and offset are projected as one vector. State: ρ,
one float32 per matrix, measured once. `W + u` is computed in float32 or wider. Apply this last: what changes
the update afterwards leaves the sphere. Weight decay, the learning rate and rounding:
`docs/guides/optimizers.md`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core import tree
from peftjax.core.targets import Targets, select
from peftjax.optim.matrices import is_matrix, matrix_layouts, select_matrices
from peftjax.optim.updates import is_placeholder, require_params, widened

_CALLER = "normalize_and_project"
# Parameters on one sphere: each with the axes to sum over, the inputs first and then the outputs.
_Sphere = dict[str, tuple[tuple[int, ...], ...]]


class NapState(NamedTuple):
    """The state of `normalize_and_project`."""

    norms: dict[str, Array]
    """ρ by the path of the matrix, or of the norm's scale: the stack's shape, unit axes for the rest."""
    inner: Any
    """The state of the optimizer inside."""


def normalize_and_project(
    tx: optax.GradientTransformation,
    *,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    norms: Targets | None = None,
    layouts: Mapping[str, str] | None = None,
    strict: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Make every step of an optimizer end on the sphere of the first norm (equation above).

    Args:
        tx: the whole optimizer, learning rate included.
        targets: which matrices, as in `lora`; 'all-linear' leaves the readout, convolutions and embeddings
            free.
        exclude: what to leave out, in the same forms; wins over `targets`.
        norms: normalization modules, by name as `targets`, whose scale (with the bias where there is one)
            is kept on a sphere too.
        layouts: axes by the end of a name, where it does not tell them.
        strict: refuse parameters in which 'all-linear' finds no matrix; by default the steps are those of
            `tx`.

    Raises:
        PeftError: names or layouts match nothing, or an update without the parameters.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.normalize_and_project(optax.adamw(1e-2))
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    inner = optax.with_extra_args_support(tx)

    def spheres(params: Any) -> dict[str, _Sphere]:
        return {**_matrices(params, targets, exclude, layouts, strict), **_pairs(params, norms)}

    def init(params: Any) -> NapState:
        if is_placeholder(params):
            return NapState(jnp.zeros([], jnp.int32), inner.init(params))
        leaves = tree.named_leaves(params)
        found = spheres(params)
        return NapState({name: _norm(leaves, sphere) for name, sphere in found.items()}, inner.init(params))

    def update(grads: Any, state: NapState, params: Any = None, **extra: Any) -> tuple[Any, NapState]:
        require_params(params, _CALLER)
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        weights, steps = tree.named_leaves(params), tree.named_leaves(updates)
        projected = {}
        for name, sphere in spheres(params).items():
            projected |= _project(weights, steps, sphere, state.norms[name])
        updates = tree.map_named(lambda path, step: projected.get(path, step), updates)
        return updates, NapState(state.norms, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _project(
    weights: Mapping[str, Array], steps: Mapping[str, Array], sphere: _Sphere, rho: Array
) -> dict[str, Array]:
    """The steps that end on the sphere of radius rho, in float32 or wider."""
    moved = {path: widened(weights[path]) + widened(steps[path]) for path in sphere}
    norm = _norm(moved, sphere)
    factor = jnp.where((rho > 0) & (norm > 0), rho / norm, 1.0)
    lost = (rho > 0) & (norm == 0)
    return {path: jnp.where(lost, 0.0, factor * moved[path] - widened(weights[path])) for path in sphere}


def _norm(leaves: Mapping[str, Array], sphere: _Sphere) -> Array:
    total = 0.0
    for path, sums in sphere.items():
        squares = jnp.square(widened(leaves[path]))
        for axes in sums:
            squares = jnp.sum(squares, axes, keepdims=True)
        total = total + squares
    return jnp.sqrt(total)


def _matrices(
    params: Any,
    targets: Targets,
    exclude: Targets | None,
    layouts: Mapping[str, str] | None,
    strict: bool,
) -> dict[str, _Sphere]:
    paths = select_matrices(
        params, targets, caller=_CALLER, exclude=exclude, strict=strict, eligible=is_matrix
    )
    found = matrix_layouts(params, layouts, caller=_CALLER)
    return {path: {path: (found[path].positions("i"), found[path].positions("o"))} for path in paths}


def _pairs(params: Any, norms: Targets | None) -> dict[str, _Sphere]:
    if norms is None:
        return {}
    scales = select(params, norms, caller=_CALLER, eligible=_is_scale, names=_names_of_norm)
    leaves, last = tree.named_leaves(params), ((-1,),)
    biases = {path: f"{tree.module_of(path)}/bias" for path in scales}
    return {
        path: {path: last, bias: last} if bias in leaves else {path: last} for path, bias in biases.items()
    }


def _is_scale(path: str, leaf: Any) -> bool:
    return path.rsplit("/", 1)[-1] == "scale" and jnp.issubdtype(leaf.dtype, jnp.floating)


def _names_of_norm(path: str) -> tuple[str, ...]:
    return path, tree.module_of(path)
