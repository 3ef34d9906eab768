"""How the activations of a backbone lie on a mesh: rows over `data` and `fsdp`, tokens, heads.

Without it XLA is free to divide the work of a step by features, as the weights are, and then sums activations
over devices. Told where activations lie, it gathers weights.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, Float

from peftjax.backbone.logits import Logits
from peftjax.core.errors import PeftError
from peftjax.core.mesh_axes import AXES, FEATURES, ROWS, TOKENS
from peftjax.weights.base import Weight

T = TypeVar("T")


def require_mesh(mesh: Mesh) -> None:
    """Raise a PeftError unless a mesh has the axes that activations lie over, and leaves the rest to XLA."""
    if missing := [axis for axis in AXES if axis not in mesh.shape]:
        raise PeftError(f"the mesh has no axis {missing[0]!r}; make one with pj.parallel.make_mesh")
    if AxisType.Explicit in mesh.axis_types:
        raise PeftError(
            "the mesh has Explicit axes: give the backbone one of pj.parallel.make_mesh, and put the loss "
            "into jax.sharding.auto_axes; see the guide on several devices"
        )


def stream_on_mesh(x: Float[Array, "B S D"], mesh: Mesh | None) -> Float[Array, "B S D"]:
    """The stream: rows over `data` and `fsdp`, tokens over `sequence`; without a mesh as it is."""
    return _on_mesh(x, mesh, (ROWS, TOKENS))


def features_on_mesh(x: Float[Array, "B S N ..."], mesh: Mesh | None) -> Float[Array, "B S N ..."]:
    """Heads, or the inner features of a feed-forward: over `tensor` too."""
    return _on_mesh(x, mesh, (ROWS, TOKENS, FEATURES))


def kernel_on_mesh(kernel: Float[Array, "D F"], mesh: Mesh | None, *, last: bool) -> Float[Array, "D F"]:
    """A kernel as its product needs it: put together over `fsdp`. Of a weight that is codes, the codes are.

    Args:
        kernel: of a linear layer.
        mesh: of the activations.
        last: whether the layer is the last of its branch, whose inputs lie over `tensor`, not its outputs.
    """
    return _on_mesh(kernel, mesh, (FEATURES, ()) if last else ((), FEATURES))


def ids_on_mesh(batch: Mapping[str, ArrayLike], mesh: Mesh | None) -> Mapping[str, ArrayLike]:
    """A batch whose ids are on all devices of `fsdp`, each of which looks up its part of every embedding."""
    if mesh is None:
        return batch
    whole = {name: x for name, x in batch.items() if jnp.issubdtype(x.dtype, jnp.integer)}
    return {**batch, **{name: _on_mesh(x, mesh, (("data",), TOKENS)) for name, x in whole.items()}}


def embeddings_on_mesh(x: Float[Array, "B S D"], mesh: Mesh | None) -> Float[Array, "B S D"]:
    """What was looked up, in parts over `fsdp` as the table is, and then by rows as the stream."""
    return stream_on_mesh(_on_mesh(x, mesh, (("data",), TOKENS, ("fsdp",))), mesh)


def logits_on_mesh(outputs: T, mesh: Mesh | None) -> T:
    """Logits over a vocabulary: the columns of the output layer over `tensor`; other outputs as they are.

    The output layer is put together once, before a loss goes through the tokens part by part: left to a TPU's
    compiler it is gathered in every part.
    """
    if mesh is None or not isinstance(outputs, Logits):
        return outputs
    rows, tokens = _parts(outputs.hidden.shape, mesh, (ROWS, TOKENS))
    devices = math.prod(mesh.shape[name] for names in (rows, tokens) for name in names or ())
    if isinstance(outputs.kernel, Weight):
        return replace(outputs, devices=devices)
    columns = (FEATURES, ()) if outputs.tied else ((), FEATURES)
    kernel = lax.optimization_barrier(_on_mesh(outputs.kernel, mesh, columns))
    return replace(outputs, kernel=kernel, devices=devices)


def _on_mesh(x: Array, mesh: Mesh | None, axes: tuple[tuple[str, ...], ...]) -> Array:
    """An activation with its first axes over those of a mesh."""
    if mesh is None:
        return x
    parts = PartitionSpec(*_parts(x.shape, mesh, axes))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, parts))


def _parts(
    shape: tuple[int, ...], mesh: Mesh, axes: tuple[tuple[str, ...], ...]
) -> list[tuple[str, ...] | None]:
    """The mesh axes of the first axes of an array; None of one that they do not divide, which is whole."""
    return [
        names if size % math.prod(mesh.shape[name] for name in names) == 0 else None
        for size, names in zip(shape, axes)
    ]
