"""No radial part in the update of a scale-invariant weight: the projection of AdamP and SGDP.

"AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", Heo et al., ICLR 2021,
arXiv 2006.08217. Of a matrix W `[in, out]` with gradient G, and the direction D that an optimizer proposes,

    c_k = |cos(G_k, W_k)|            columns k, over `in` numbers             (one channel)
    c   = |cos(G, W)|                                                         (the layer)
    max_k c_k < delta / √in:         D_k ← D_k - Ŵ_k ⟨Ŵ_k, D_k⟩,   Ŵ = W / (‖W‖ + eps),   ratio = wd_ratio
    else, c < delta / √(in·out):     D ← D - Ŵ ⟨Ŵ, D⟩,                                    ratio = wd_ratio
    else                             D as it is,                                          ratio = 1
    direction: D + ratio · weight_decay · W

Every matrix of a stack decides for itself. Vectors, norms, biases (stacked or not) and factors of adapters
are never projected and decay in full. No state beside the optimizer's; computed in float32 or wider.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from peftjax.core import tree
from peftjax.optim.matrices import matrix_layouts
from peftjax.optim.updates import is_placeholder, require_params, widened
from peftjax.weights.layout import Layout


def remove_radial(
    tx: optax.GradientTransformation,
    *,
    delta: ArrayLike = 0.1,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    wd_ratio: ArrayLike = 0.1,
    layouts: Mapping[str, str] | None = None,
    caller: str = "remove_radial",
) -> optax.GradientTransformationExtraArgs:
    """Project the directions of `tx` by the equations above; a learning rate comes after.

    Args:
        tx: from gradients to directions of ascent, without learning rate and weight decay.
        delta: how near to zero a cosine must be, 0 for never.
        eps: added to norms.
        weight_decay: added as `weight_decay · W`.
        wd_ratio: the share of it that a projected matrix has.
        layouts: axes by the end of a name, e.g. `{"gates": "sio", "decay": "so"}`, where names do not tell
            them; without 'i' or without 'o' the parameter holds vectors.
        caller: the optimizer's name, for the errors.

    Raises:
        PeftError: a layout does not fit or is not used, or an update without the parameters.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        if not is_placeholder(params):
            matrix_layouts(params, layouts, caller=caller)
        return inner.init(params)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        require_params(params, caller)
        found = matrix_layouts(params, layouts, caller=caller)
        directions, state = inner.update(grads, state, params, **extra)

        def one(path: str, direction: Array, gradient: Array, weight: Array) -> Array:
            d, g, w = (widened(x) for x in (direction, gradient, weight))
            layout, ratio = found.get(path), 1.0
            if layout is not None:
                d, projected = tangent(w, g, d, layout, delta=delta, eps=eps)
                ratio = jnp.where(projected, wd_ratio, 1.0)
            return (d + ratio * weight_decay * w).astype(direction.dtype)

        names = tree.map_named(lambda path, _: path, directions)
        return jax.tree.map(one, names, directions, grads, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def tangent(
    weight: Array, gradient: Array, direction: Array, layout: Layout, *, delta: ArrayLike, eps: ArrayLike
) -> tuple[Array, Array]:
    """The direction without its radial part where the gradient has none, and which matrices those are.

    Args:
        weight: of the layout's logical shape, as the next two.
        gradient: the raw gradient.
        direction: what to project.
        layout: which axes are stacks, inputs, outputs.
        delta: as above.
        eps: as above.

    Returns:
        The direction, and truth values of the stack's shape with unit axes for the rest.
    """
    inputs, outputs = layout.positions("i"), layout.positions("o")
    pairs = (weight, weight), (gradient, gradient), (weight, gradient), (weight, direction)
    of_channels = [jnp.sum(x * y, inputs, keepdims=True) for x, y in pairs]
    of_layer = [jnp.sum(dot, outputs, keepdims=True) for dot in of_channels]

    def view(dots: list[Array], size: int) -> tuple[Array, Array]:
        norm, gradient_norm = jnp.sqrt(dots[0]), jnp.sqrt(dots[1])
        cosine = jnp.abs(dots[2]) / (jnp.maximum(norm, eps) * jnp.maximum(gradient_norm, eps))
        orthogonal = jnp.max(cosine, inputs + outputs, keepdims=True) < delta / math.sqrt(size)
        return orthogonal, dots[3] / (norm + eps) / (norm + eps)

    n_in, n_out = layout.matrix
    channels, radial_of_channels = view(of_channels, n_in)
    layer, radial_of_layer = view(of_layer, n_in * n_out)
    radial = jnp.where(channels, radial_of_channels, jnp.where(layer, radial_of_layer, 0.0))
    return direction - radial * weight, channels | layer
