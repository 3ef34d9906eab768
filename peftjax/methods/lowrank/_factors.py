"""What the low-rank methods share: their scale, and how factors start."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.core.naming import is_embedding
from peftjax.core.targets import pattern_value, require_patterns_used
from peftjax.methods import _targets
from peftjax.methods._targets import Target
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_canonical, to_logical
from peftjax.weights.sharding import like, whole

Start = Callable[[Array, "ScaledTarget", Any], tuple[Array, Array, Any]]
Bias = Literal["none", "adapted", "all", "added"]


@dataclass(frozen=True, kw_only=True)
class ScaledTarget(Target):
    """A target whose product of factors is multiplied by `scale`."""

    scale: float


def find_targets(
    params: Any,
    *,
    caller: str,
    alpha: float,
    rslora: bool,
    alpha_pattern: Mapping[str, float] | None,
    **where: Any,
) -> list[ScaledTarget]:
    """The targets with their scale `alpha / rank`, rsLoRA `alpha / √rank`.

    Args:
        params: the parameters.
        caller: the method's name, for the errors.
        alpha: of every weight that `alpha_pattern` does not name.
        rslora: whether the scale is rsLoRA's.
        alpha_pattern: as in `lora`.
        **where: the other arguments of `peftjax.methods._targets.find_targets`.

    Raises:
        PeftError: as that search; an alpha pattern matches nothing, or an alpha is not positive.
    """
    found = []
    plain = _targets.find_targets(params, caller=caller, **where)
    require_patterns_used(caller, alpha_pattern, [target.path for target in plain])
    for target in plain:
        own_alpha = pattern_value(target.path, alpha_pattern, alpha)
        positive(caller, "alpha", own_alpha, path=target.path)
        scale = own_alpha / (math.sqrt(target.rank) if rslora else target.rank)
        found.append(ScaledTarget(**vars(target), scale=scale))
    return found


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


def start_zero_a(key: Array, target: Target, leaf: Any) -> tuple[Array, Array, Any]:
    """`a = 0`, `b ~ U(-1/√r, 1/√r)`; for a lookup table as `start_uniform`."""
    if is_embedding(target.path):
        return start_uniform(key, target, leaf)
    a, b = zeros(target)
    bound = 1.0 / math.sqrt(target.rank)
    return a, jax.random.uniform(key, b.shape, minval=-bound, maxval=bound), leaf


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


def plain_matrices(caller: str, target: Target, leaf: Any) -> Float[Array, "*stack n m"]:
    """The target's matrices in float32, for a start that needs their values.

    Raises:
        PeftError: the base is not a plain array, or only some of its layers are adapted.
    """
    if isinstance(leaf, Weight):
        raise PeftError(
            f"{caller}: {target.path!r} is a {type(leaf).__name__}; this start needs a plain "
            "floating-point base, so put it before the method that rewrote it"
        )
    if target.layers is not None and len(target.layers) < target.layout.stack[0]:
        raise PeftError(f"{caller}: {target.path!r} is stacked; this start takes all of its layers")
    return to_canonical(whole(leaf), target.layout).astype(jnp.float32)


def residual(leaf: Array, a: Array, b: Array, target: ScaledTarget) -> Array:
    """`leaf - scale · aᵀb` in the leaf's dtype: the base under which the factors start as a no-op."""
    delta = target.scale * jnp.einsum("...rn,...rm->...nm", a, b)
    return (leaf.astype(jnp.float32) - like(to_logical(delta, target.layout), leaf)).astype(leaf.dtype)
