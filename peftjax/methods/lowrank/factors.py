"""What the low-rank methods share: which weights, which axes, which rank, and how factors start."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from peftjax import tree
from peftjax.errors import PeftError
from peftjax.tree import Targets
from peftjax.weights.arrange import to_canonical, to_logical
from peftjax.weights.base import Weight
from peftjax.weights.layout import Layout, guess_layout

Start = Callable[[Array, "Target", Any], tuple[Array, Array, Any]]
Bias = Literal["none", "adapted", "all"]


@dataclass(frozen=True)
class Target:
    """One weight to adapt: static facts, known before training."""

    path: str
    layout: Layout
    rank: int
    scale: float
    layers: tuple[int, ...] | None = None  # of the first stack axis; None means all

    @property
    def stack(self) -> tuple[int, ...]:
        """The stack shape of the trained factors."""
        stack = self.layout.stack
        return stack if self.layers is None else (len(self.layers), *stack[1:])


def find_targets(
    params: Any,
    *,
    who: str,
    rank: int,
    alpha: float,
    rslora: bool,
    targets: Targets,
    exclude: Targets | None,
    layers: int | Sequence[int] | None,
    layers_pattern: str | None,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    layouts: Mapping[str, str] | None,
) -> list[Target]:
    """Every weight that the options ask for.

    The scale is `alpha / rank`, with rsLoRA `alpha / sqrt(rank)`.

    Raises:
        PeftError: nothing, or only part of a list, is matched; a pattern or a layer number is not
            used; a rank or alpha is not positive, or a rank larger than the matrix.
    """
    leaves = tree.named_leaves(params)
    paths = tree.select(params, targets, who=who, exclude=exclude)
    if layers is not None:
        wanted = (layers,) if isinstance(layers, int) else tuple(sorted(set(layers)))
        picked = {path: _layers_of(path, leaves, wanted, layers_pattern, layouts) for path in paths}
        _require_layers_exist(who, wanted, picked)
        paths = [path for path in paths if picked[path] != ()]
    else:
        picked = dict.fromkeys(paths)
    for patterns in (rank_pattern, alpha_pattern, layouts):
        tree.require_patterns_used(who, patterns, paths)
    found = []
    for path in paths:
        layout = layout_of(path, leaves, layouts)
        own_rank = tree.pattern_value(path, rank_pattern, rank)
        own_alpha = tree.pattern_value(path, alpha_pattern, alpha)
        if own_rank < 1:
            raise PeftError(f"{who}: rank must be positive, got {own_rank} for {path!r}")
        if own_alpha <= 0:
            raise PeftError(f"{who}: alpha must be positive, got {own_alpha} for {path!r}")
        if own_rank > min(layout.matrix):
            raise PeftError(
                f"{who}: rank {own_rank} is larger than {path!r}, a matrix of "
                f"{layout.matrix[0]} x {layout.matrix[1]}; lower rank, set rank_pattern, or exclude it"
            )
        scale = own_alpha / (math.sqrt(own_rank) if rslora else own_rank)
        # Where the path tells the layer, a stack is one of experts, all of which it takes.
        stacked = picked[path] if tree.layer_index(path, layers_pattern) is None else None
        found.append(Target(path, layout, own_rank, scale, stacked))
    return found


def layout_of(path: str, leaves: Mapping[str, Any], layouts: Mapping[str, str] | None) -> Layout:
    """The layout of a weight: its own, the one given, or the one its name tells."""
    leaf = leaves[path]
    if isinstance(leaf, Weight):
        return leaf.layout
    bias = leaves.get(f"{tree.module_of(path)}/bias")
    guess = guess_layout(path, leaf.shape, getattr(bias, "shape", None))
    return Layout.parse(tree.pattern_value(path, layouts, guess), leaf.shape, path)


def _layers_of(
    path: str,
    leaves: Mapping[str, Any],
    wanted: tuple[int, ...],
    layers_pattern: str | None,
    layouts: Mapping[str, str] | None,
) -> tuple[int, ...]:
    """Which of the wanted layers this weight holds: by its name, or by its first stack axis."""
    index = tree.layer_index(path, layers_pattern)
    if index is not None:
        return (index,) if index in wanted else ()
    stack = layout_of(path, leaves, layouts).stack
    return tuple(layer for layer in wanted if stack and 0 <= layer < stack[0])


def _require_layers_exist(who: str, wanted: tuple[int, ...], picked: Mapping[str, tuple[int, ...]]) -> None:
    if not wanted:
        raise PeftError(f"{who}: layers names no layer; give at least one number, or None for all")
    held = {layer for layers in picked.values() for layer in layers}
    for layer in wanted:
        if layer not in held:
            raise PeftError(f"{who}: no target lies in layer {layer}; targets: {tree.nearest('', picked)}")


def key_for(key: Array, path: str) -> Array:
    """A key of the parameter's own, the same whatever else is adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def is_embedding(path: str) -> bool:
    """Whether the parameter is a lookup table, whose factors start the other way round."""
    return path.rsplit("/", 1)[-1] in ("embedding", "embeddings")


def start_uniform(key: Array, target: Target, leaf: Any) -> tuple[Array, Array, Any]:
    """`a ~ U(-1/√in, 1/√in)`, `b = 0`; for a lookup table `a = 0`, `b ~ N(0, 1)`."""
    a, b = zeros(target)
    if is_embedding(target.path):
        return a, jax.random.normal(key, b.shape), leaf
    bound = 1.0 / math.sqrt(target.layout.matrix[0])
    return jax.random.uniform(key, a.shape, minval=-bound, maxval=bound), b, leaf


def start_gaussian(key: Array, target: Target, leaf: Any) -> tuple[Array, Array, Any]:
    """`a ~ N(0, 1/r²)`, `b = 0`; for a lookup table as `start_uniform`."""
    if is_embedding(target.path):
        return start_uniform(key, target, leaf)
    a, b = zeros(target)
    return jax.random.normal(key, a.shape) / target.rank, b, leaf


def start_orthogonal(key: Array, target: Target, leaf: Any) -> tuple[Array, Array, Any]:
    """Both factors nonzero with `aᵀb = 0`: they span orthogonal halves of a random basis of rank r.

    Raises:
        PeftError: the rank is odd.
    """
    rank = target.rank
    if rank % 2:
        raise PeftError(f"init 'orthogonal' needs an even rank, got {rank} for {target.path!r}")
    (n, m), stack = target.layout.matrix, target.stack
    basis_key, a_key, b_key = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(basis_key, (*stack, rank, rank)))[0]
    odd, even = basis[..., 0::2, :], basis[..., 1::2, :]
    a = jnp.einsum("...hr,...hn->...rn", odd, jax.random.normal(a_key, (*stack, rank // 2, n)))
    b = jnp.einsum("...hr,...hm->...rm", even, jax.random.normal(b_key, (*stack, rank // 2, m)))
    return a / 10.0, b / 10.0, leaf


def zeros(target: Target) -> tuple[Float[Array, "*stack r n"], Float[Array, "*stack r m"]]:
    """Both factors of a target, zero, float32."""
    n, m = target.layout.matrix
    return (
        jnp.zeros((*target.stack, target.rank, n), jnp.float32),
        jnp.zeros((*target.stack, target.rank, m), jnp.float32),
    )


def plain_matrices(who: str, target: Target, leaf: Any) -> Float[Array, "*stack n m"]:
    """The target's matrices in float32, for a start that needs their values.

    Raises:
        PeftError: the base is not a plain array, or only some of its layers are adapted.
    """
    if isinstance(leaf, Weight):
        raise PeftError(
            f"{who}: {target.path!r} is a {type(leaf).__name__}; this start needs a plain "
            "floating-point base, so put it before the method that rewrote it"
        )
    if target.layers is not None and len(target.layers) < target.layout.stack[0]:
        raise PeftError(f"{who}: {target.path!r} is stacked; this start takes all of its layers")
    return to_canonical(leaf, target.layout).astype(jnp.float32)


def residual(leaf: Array, a: Array, b: Array, target: Target) -> Array:
    """`leaf - scale · aᵀb` in the leaf's dtype: the base under which the factors start as a no-op."""
    delta = target.scale * jnp.einsum("...rn,...rm->...nm", a, b)
    return (leaf.astype(jnp.float32) - to_logical(delta, target.layout)).astype(leaf.dtype)


def all_layers(factor: Array, target: Target) -> Array:
    """The factor of the chosen layers, with zeros for the others, so that a scan can take it."""
    if target.layers is None or factor.shape[0] == target.layout.stack[0]:
        return factor
    whole = jnp.zeros((target.layout.stack[0], *factor.shape[1:]), factor.dtype)
    return whole.at[jnp.asarray(target.layers)].set(factor)
