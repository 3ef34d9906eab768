"""How the activations of a backbone lie on a mesh: rows over `data`, `fsdp` and `expert`, tokens, heads.

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
from peftjax.core.mesh_axes import AXES, FEATURES, GATHERED, ROWS, TOKENS, dividing
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


def require_heads(mesh: Mesh, heads: int) -> None:
    """Raise a PeftError where attention cannot divide its heads over the devices of a row's tokens."""
    axes = (*FEATURES, *TOKENS)
    if _devices(mesh, TOKENS) > 1 and heads % _devices(mesh, axes):
        sizes = " and ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        raise PeftError(
            f"the mesh has {sizes}, and attention divides {heads} heads over both, as it needs whole rows of "
            f"tokens; choose sizes whose product divides {heads}, and put the other devices on fsdp"
        )


def row_and_token_axes(rows: int, tokens: int, mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes of the rows and of the tokens of a batch.

    Rows lie over `data`, `fsdp` and `expert`, tokens over `sequence`, and over an axis that the rows leave
    free.
    """
    of_rows = dividing(rows, ROWS, mesh.shape)
    of_tokens = (*(axis for axis in ROWS if axis not in of_rows and mesh.shape[axis] > 1), *TOKENS)
    fits = (axes for axes in (of_tokens, TOKENS, ()) if tokens % _devices(mesh, axes) == 0)
    return of_rows, next(fits)


def stream_on_mesh(x: Float[Array, "B S D"], mesh: Mesh | None) -> Float[Array, "B S D"]:
    """The stream: rows and tokens over `row_and_token_axes`; without a mesh as it is."""
    return x if mesh is None else _on_mesh(x, mesh, row_and_token_axes(*x.shape[:2], mesh))


def features_on_mesh(x: Float[Array, "B S N ..."], mesh: Mesh | None) -> Float[Array, "B S N ..."]:
    """Heads, or the inner features of a feed-forward: over `tensor` too."""
    if mesh is None:
        return x
    return _on_mesh(x, mesh, (*row_and_token_axes(*x.shape[:2], mesh), FEATURES))


def attention_axes(query: tuple[int, ...], mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes of rows and of heads, of queries [B, T, N, H] whose tokens are whole.

    Heads lie over `tensor`, and over the axes that otherwise divide the tokens where they are so many.
    """
    batch, length, heads, _ = query
    of_rows, of_tokens = row_and_token_axes(batch, length, mesh)
    fits = (axes for axes in ((*FEATURES, *of_tokens), FEATURES, ()) if heads % _devices(mesh, axes) == 0)
    return of_rows, next(fits)


def heads_on_mesh(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    mesh: Mesh,
) -> tuple[Array, Array, Array]:
    """Whole rows of tokens, and heads over `attention_axes`: of tokens that were divided an all-to-all.

    Heads of keys and values that are fewer than the devices are repeated, no more than that takes.
    """
    of_rows, of_heads = attention_axes(query.shape, mesh)
    devices, kv_heads = _devices(mesh, of_heads), key.shape[2]
    times = devices // math.gcd(devices, kv_heads)
    key, value = (x if times == 1 else jnp.repeat(x, times, axis=2) for x in (key, value))
    whole: tuple[str, ...] = ()
    return tuple(_on_mesh(x, mesh, (of_rows, whole, of_heads)) for x in (query, key, value))


def tokens_to_heads(query: tuple[int, ...], mesh: Mesh | None) -> bool:
    """Whether a mesh divides the tokens of queries [B, T, N, H], and can divide so many heads instead."""
    if mesh is None:
        return False
    _, of_tokens = row_and_token_axes(*query[:2], mesh)
    return _devices(mesh, of_tokens) > 1 and set(of_tokens) <= set(attention_axes(query, mesh)[1])


def token_devices(x: Float[Array, "B S D"], mesh: Mesh | None) -> int:
    """Over how many devices the tokens of the stream are divided."""
    return 1 if mesh is None else _devices(mesh, row_and_token_axes(*x.shape[:2], mesh)[1])


def kernel_on_mesh(kernel: Float[Array, "D F"], mesh: Mesh | None, *, last: bool) -> Float[Array, "D F"]:
    """A kernel as its product needs it: put together over `fsdp` and `expert`, of codes the codes.

    Args:
        kernel: of a linear layer.
        mesh: of the activations.
        last: whether the layer is the last of its branch, whose inputs lie over `tensor`, not its outputs.
    """
    return _on_mesh(kernel, mesh, (FEATURES, ()) if last else ((), FEATURES))


def whole_on_mesh(kernel: Float[Array, "D E"], mesh: Mesh | None) -> Float[Array, "D E"]:
    """A kernel that no axis divides where its product is."""
    return _on_mesh(kernel, mesh, ((), ()))


def ids_on_mesh(batch: Mapping[str, ArrayLike], mesh: Mesh | None) -> Mapping[str, ArrayLike]:
    """A batch whose ids are wherever the table is in parts: each device looks up its part of embeddings."""
    if mesh is None:
        return batch
    whole = {name: x for name, x in batch.items() if jnp.issubdtype(x.dtype, jnp.integer)}
    return {**batch, **{name: _on_mesh(x, mesh, (("data",), TOKENS)) for name, x in whole.items()}}


def embeddings_on_mesh(x: Float[Array, "B S D"], mesh: Mesh | None) -> Float[Array, "B S D"]:
    """What was looked up, in parts as the table is, and then by rows as the stream."""
    return stream_on_mesh(_on_mesh(x, mesh, (("data",), TOKENS, GATHERED)), mesh)


def logits_on_mesh(outputs: T, mesh: Mesh | None) -> T:
    """Logits over a vocabulary: the columns of the output layer over `tensor`; other outputs as they are.

    The output layer is put together once, before a loss goes through the tokens part by part: left to a TPU's
    compiler it is gathered in every part.
    """
    if mesh is None or not isinstance(outputs, Logits):
        return outputs
    rows, tokens = row_and_token_axes(*outputs.hidden.shape[:2], mesh)
    outputs = replace(outputs, devices=_devices(mesh, (*rows, *tokens)), token_devices=_devices(mesh, tokens))
    if isinstance(outputs.kernel, Weight):
        return outputs
    columns = (FEATURES, ()) if outputs.tied else ((), FEATURES)
    kernel = lax.optimization_barrier(_on_mesh(outputs.kernel, mesh, columns))
    return replace(outputs, kernel=kernel)


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
    return [names if size % _devices(mesh, names) == 0 else None for size, names in zip(shape, axes)]


def _devices(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
