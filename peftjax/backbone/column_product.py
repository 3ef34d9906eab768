"""A linear layer whose outputs a mesh divides over `tensor`: one sum over devices in its backward pass.

    y_t = x W_t                       t of the devices of `tensor`, W [D, F]
    x'  = sum_t y'_t W_tᵀ

Behind a low-rank adapter each y'_t has two ways back, `y'_t W_tᵀ + (y'_t B_t) A`. Left to XLA, each is
summed over the devices where its product is, and the sums of query, key and value do not join, as thin
products lie between them. Here a device adds its own two before the sum; what is summed beside it is the
gradient of A, r D numbers a layer, instead of r numbers a token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from peftjax.backbone.layers import over_tokens
from peftjax.core import compat, primitives
from peftjax.core.mesh_axes import FEATURES
from peftjax.weights.base import Weight
from peftjax.weights.column_normalized import ColumnNormalized
from peftjax.weights.low_rank import LowRank

_COLUMNS = PartitionSpec(None, FEATURES)


def column_product(
    x: Float[Array, "... D"], kernel: Float[Array, "D F"], mesh: Mesh, **options: Any
) -> Float[Array, "... F"]:
    """`over_tokens`, of a kernel whose columns lie over `tensor`."""
    return _product(x, kernel, mesh=mesh, **options)[0]


def _run(x: Array, kernel: Array, *, mesh: Mesh, **options: Any) -> list[Array]:
    return [over_tokens(x, kernel, **options)]


def _on_each_device(x: Array, kernel: Array, *, mesh: Mesh, **options: Any) -> list[Array]:
    def own(x: Array, kernel: Array) -> Array:
        # Cast before the products, so that their gradients are added before they are summed over devices.
        return over_tokens(compat.made_to_vary(x, frozenset(FEATURES)), kernel, **options)

    columns = PartitionSpec(*(None,) * (x.ndim - 1), FEATURES)
    specs = {"in_specs": (PartitionSpec(), _COLUMNS), "out_specs": columns}
    return [jax.shard_map(own, mesh=mesh, axis_names=set(FEATURES), **specs)(x, kernel)]


def _on_weights(evaluator: Any, eqn: Any, operands: list[Any]) -> list[Any]:
    _, kernel = operands
    run = _on_each_device if _is_low_rank(kernel) and kernel.part_specs(_COLUMNS) is not None else _run
    with compat.context_of(eqn):  # the kinds of the mesh's axes there
        return evaluator.trace(partial(run, **eqn.params))(*operands)


def _is_low_rank(kernel: Any) -> bool:
    """Whether thin products stand beside the product with an array; what is coded is left to XLA."""
    if not isinstance(kernel, LowRank | ColumnNormalized):
        return False
    return not isinstance(kernel.base, Weight) or _is_low_rank(kernel.base)


def _differentiable(moving: Sequence[bool], operands: Sequence[Any], **static: Any) -> primitives.Body:
    def run(*some: Any) -> list[Array]:
        given = iter(some)
        return _run(*(next(given) if moves else one for one, moves in zip(operands, moving)), **static)

    return run


def _mapped(arrays: Sequence[Array], axes: Sequence[int | None], **static: Any) -> list[Array]:
    return jax.vmap(partial(_run, **static), in_axes=tuple(axes))(*arrays)


_product = primitives.one_equation("column_product", _run, _differentiable, _mapped, _on_weights)
