"""NaP: normalize and project, every weight matrix back on the sphere of its first norm after every step.

"Normalization and Effective Learning Rates in Reinforcement Learning", Lyle et al., NeurIPS 2024, arXiv
2407.01800 (no released code). In a network with a normalization after every linear layer the outputs do not
depend on the norms of the weights, but the effective learning rate does: it falls with ‖W‖² (SGD) or ‖W‖
(Adam), and training makes ‖W‖ grow. For every matrix W `[in, out]` of a stack and an optimizer's step u,

    ρ = ‖W‖_F before the first step                W ← ρ (W + u) / ‖W + u‖_F

The network must have the norms and, before them, no bias; this is the projection only. Where a norm does not
follow, it is a trust region: the size of the weight is kept, the function is not. Details:

- Weight decay of a projected matrix only shortens it before it is stretched again, a change of the effective
  learning rate and no more: leave it out (`optax.adamw(mask=...)`).
- The implicit fall of the learning rate is gone: give a schedule.
- The readout has no norm behind it and is free, as are embeddings and convolutions unless named, vectors, and
  factors of adapters.
- A norm's scale g and offset b are not scale-invariant, but before an activation that is homogeneous (ReLU)
  and another norm the pair is: `norms` names those for which ‖(g, b)‖ is kept, which is √n for (1, 0).
- A matrix that begins as zero has no sphere and is free; a step that would make a matrix zero is not taken.

State: ρ, one float32 per matrix. It is never measured again, so rounding does not add up: `W + u` is computed
in float32 or wider, the projected step is returned in that dtype, and a bfloat16 weight is rounded once, when
it is applied, which changes no number and so no norm by more than 2⁻⁸ of it. In Adam's
steps, 10,000 on matrices of 32 and 64 a side and 2,000 on one of 256, |‖W‖/ρ - 1| was below 1.3e-7 in float32
(64 x 64) and at most 1e-4 to 8e-4 in bfloat16, the most where steps are too small for most numbers to change,
and level after the first two fifths. With the norm measured anew at every step it drifted to 1.2e-4 and
2.2e-2. What changes the step afterwards leaves the sphere: this comes last.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core import tree
from peftjax.core.tree import Targets
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
        exclude: the same forms; wins.
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
    scales = tree.select(params, norms, caller=_CALLER, eligible=_is_scale, names=_names_of_norm)
    leaves, last = tree.named_leaves(params), ((-1,),)
    biases = {path: f"{tree.module_of(path)}/bias" for path in scales}
    return {
        path: {path: last, bias: last} if bias in leaves else {path: last} for path, bias in biases.items()
    }


def _is_scale(path: str, leaf: Any) -> bool:
    return path.rsplit("/", 1)[-1] == "scale" and jnp.issubdtype(leaf.dtype, jnp.floating)


def _names_of_norm(path: str) -> tuple[str, ...]:
    return path, tree.module_of(path)
