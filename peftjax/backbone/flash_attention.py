"""Attention by the platform's own kernel, chosen when the program is lowered; row blocks where there is none.

    TPU           splash attention: all that `attend` knows but a bias, a prefix, dropout and rounded weights
    NVIDIA GPU    cuDNN's: of those no soft-capping, sinks or segments, and padding only behind the tokens
    elsewhere     `attend`

The backward pass keeps query, key and value, and runs the kernel forward once more. XLA cannot divide a
kernel: on a mesh it runs in the devices' own code, over rows and heads.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int

from peftjax.backbone.attention import Visibility, attend
from peftjax.backbone.on_mesh import attention_axes, heads_on_mesh
from peftjax.core import compat, primitives
from peftjax.core.derivatives import with_backward
from peftjax.core.sharding import explicit_sharding
from peftjax.kernels.attention import gpu, tpu
from peftjax.kernels.attention.operands import Operands, Scores

logger = logging.getLogger(__name__)

Attend = Callable[[Operands, Scores], Array]
Part = Callable[..., Any]
"""`(attend, operands, *rest, scores) -> arrays`: what is to be computed with an `Attend`."""


@functools.cache
def warn_of_rows(reason: str) -> None:
    """Say once, for each reason, that 'flash' was asked for and row blocks are taken."""
    logger.warning("attention 'flash': row blocks are taken where %s", reason)


def flash_attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    mask: Bool[Array, "B S"] | None,
    segments: Int[Array, "B S"] | None,
    visible: Visibility,
    windows: tuple[int | None, ...],
    scale: float | None,
    softcap: float | None,
    sinks: Float[Array, " N"] | None,
    mesh: Mesh | None,
) -> Float[Array, "B T N V"]:
    """As `attend`, by a kernel where there is one for the platform.

    Args:
        query: N heads.
        key: K heads.
        value: as `key`.
        mask: as of `attend`.
        segments: as of `attend`.
        visible: with the offset 0.
        windows: the widths that a traced window of `visible` may have.
        scale: as of `attend`.
        softcap: as of `attend`.
        sinks: as of `attend`.
        mesh: over whose devices the kernel runs, by rows and heads.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    static = visible.window is None or isinstance(visible.window, int)
    scores = Scores(scale, softcap, visible.causal, (visible.window,) if static else windows)
    window = None if static else visible.window
    if mesh is not None:
        query, key, value = heads_on_mesh(query, key, value, mesh)
    operands = Operands(query, key, value, mask, segments, window, sinks)
    if explicit_sharding(query) is not None:
        return rows(operands, scores)
    return _attention(operands, scores, mesh)


def rows(operands: Operands, scores: Scores) -> Array:
    """The reference, and what is computed where there is no kernel."""
    query, key, value, mask, segments, window, sinks = operands
    visible = Visibility(scores.causal, scores.windows[0] if window is None else window)
    return attend(
        query,
        key,
        value,
        mask=mask,
        segments=segments,
        visible=visible,
        scale=scores.scale,
        softcap=scores.softcap,
        sinks=sinks,
    )


def _forward(attend: Attend, operands: Operands, *, scores: Scores) -> tuple[Array, ...]:
    return (attend(operands, scores),)


def _gradients(attend: Attend, operands: Operands, g: Array, *, scores: Scores) -> tuple[Array | None, ...]:
    """Of query, key, value and sinks."""

    def run(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
        return attend(operands._replace(query=query, key=key, value=value, sinks=sinks), scores)

    return jax.vjp(run, *operands[:3], operands.sinks)[1](g)


def _attention(operands: Operands, scores: Scores, mesh: Mesh | None) -> Array:
    forward, gradients = (_over_mesh(bind, mesh, scores) for bind in (_bind_forward, _bind_gradients))

    def run(*operands: Array | None) -> Array:
        (mixed,) = forward(Operands(*operands))
        return mixed

    def backward(kept: tuple[Array | None, ...], g: Array) -> tuple[Array | None, ...]:
        query, key, value, sinks = gradients(Operands(*kept), g)
        return query, key, value, None, None, None, sinks

    # Inside a shard_map, what all devices share is cast first: its gradient is then summed over them.
    operands = compat.varying_alike(operands)
    return with_backward(run, lambda *operands: (run(*operands), operands), backward)(*operands)


def _over_mesh(bind: Callable[..., Any], mesh: Mesh | None, scores: Scores) -> Callable[..., Any]:
    """The operation in the own code of a mesh's devices, each with its rows and heads."""
    if mesh is None:
        return lambda operands, *rest: bind(operands, *rest, scores=scores)

    def run(operands: Operands, *rest: Array) -> tuple[Array | None, ...]:
        of_rows, of_heads = attention_axes(operands.query.shape, mesh)
        heads = PartitionSpec(of_rows, None, of_heads)
        by_row, each = PartitionSpec(of_rows), PartitionSpec(of_heads)
        places = Operands(heads, heads, heads, by_row, by_row, PartitionSpec(), each)
        places = Operands(*(None if x is None else place for x, place in zip(operands, places)))
        given = None if operands.sinks is None else each
        out_specs = (heads, heads, heads, given) if rest else (heads,)

        def local(operands: Operands, *rest: Array) -> tuple[Array | None, ...]:
            found = bind(operands, *rest, scores=scores)
            if not rest or found[3] is None or not of_rows:
                return found
            return *found[:3], lax.psum(found[3], of_rows)

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(places, *(heads for _ in rest)), out_specs=out_specs, check_vma=False
        )
        return mapped(operands, *rest)

    return run


# The operation, as primitives.


def _on_rows(part: Part) -> primitives.Body:
    return lambda *leaves, **static: _run(partial(part, rows), leaves, **static)


def _on_tpu(part: Part) -> primitives.Body:
    def run(operands: Operands, *rest: Array, scores: Scores) -> tuple[Any, ...]:
        if (reason := tpu.refused(operands, scores)) is not None:
            warn_of_rows(reason)
            return part(rows, operands, *rest, scores=scores)
        return part(tpu.attend, operands, *rest, scores=scores)

    return lambda *leaves, **static: _run(run, leaves, **static)


def _on_gpu(part: Part) -> primitives.Body:
    def run(operands: Operands, *rest: Array, scores: Scores) -> tuple[Any, ...]:
        if (reason := gpu.refused(operands, scores)) is not None:
            warn_of_rows(reason)
            return part(rows, operands, *rest, scores=scores)
        kernel, plain = (partial(part, attend, scores=scores) for attend in (gpu.attend, rows))
        kernel = gpu.in_device_code(kernel)
        if operands.mask is None:
            return kernel(operands, *rest)
        return lax.cond(gpu.padded_behind(operands.mask), kernel, plain, operands, *rest)

    return lambda *leaves, **static: _run(run, leaves, **static)


def _run(part: Part, leaves: tuple[Array, ...], *, structure: Any, scores: Scores) -> list[Array]:
    """The part on the arrays of `structure`, all of which `vmap` may have given more axes."""
    run = partial(part, scores=scores)
    given = jax.tree.unflatten(structure, leaves)
    for _ in range(given[0].query.ndim - 4):
        run = jax.vmap(run)
    return jax.tree.leaves(run(*given))


def _operation(name: str, part: Part) -> Callable[..., Any]:
    kernels = {"tpu": _on_tpu(part), "cuda": _on_gpu(part)}
    bind = primitives.by_platform(name, _on_rows(part), kernels, counted_as_plain=True)

    def run(operands: Operands, *rest: Array, scores: Scores) -> tuple[Array | None, ...]:
        leaves, structure = jax.tree.flatten((operands, *rest))
        found = bind(*leaves, structure=structure, scores=scores)
        return tuple(found) if not rest or operands.sinks is not None else (*found, None)

    return run


_bind_forward = _operation("attention", _forward)
_bind_gradients = _operation("attention_gradients", _gradients)
