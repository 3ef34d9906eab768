"""A function with a backward pass of its own, whose other derivatives are made from that pass.

`jax.custom_vjp` allows no forward mode, and nothing that contains it: jvp, jacfwd, Hessian-vector products.
The tangent of such a function is the transpose of its backward pass:

    forward  (y, k) = f(x)        backward  x̄ = B(k) ȳ        tangent  ẏ = B(k)ᵀ ẋ

It is one equation, which reverse mode transposes back into B: gradients and their residuals are unchanged,
and higher derivatives are those of B.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from peftjax.core import primitives


def with_backward(
    fn: Callable[..., Any],
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[[Any, Any], tuple[Any, ...]],
    *,
    linear: Callable[[Any, Any], tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """`fn` with a backward pass of its own, as `jax.custom_vjp` gives it, and with forward mode.

    Args:
        fn: of trees of arrays.
        forward: `(*args) -> (outputs, residuals)`. A second derivative differentiates how it computes the
            outputs.
        backward: `(residuals, cotangents) -> cotangents of each of args`; None for what has none.
        linear: the part of `backward` that is linear in the cotangents, whose transpose forward mode is; by
            default all of it.
    """

    @jax.custom_jvp
    def call(*args: Any) -> Any:
        return fn(*args)

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        outputs, residuals = forward(*primals)
        outs, out_tree = jax.tree.flatten(outputs)
        kept, kept_tree = jax.tree.flatten(residuals)
        leaves = jax.tree.leaves(tangents, is_leaf=_is_zero)
        moves = [not _is_zero(leaf) and jax.typeof(leaf).dtype != jax.dtypes.float0 for leaf in leaves]
        if not any(moves):
            return outputs, jax.tree.map(jnp.zeros_like, outputs)
        shape = jax.tree.map(jax.typeof, primals)

        def as_pull(backward: Callable[[Any, Any], tuple[Any, ...]]) -> primitives.Pull:
            def pull(kept: list[Any], *cotangents: Any) -> list[Any]:
                given = backward(
                    jax.tree.unflatten(kept_tree, kept), jax.tree.unflatten(out_tree, cotangents)
                )
                return [ct for ct, does in zip(_leaves_of(given, shape), moves, strict=True) if does]

            return pull

        moving = [leaf for leaf, does in zip(leaves, moves) if does]
        found = primitives.transpose_of(as_pull(backward), as_pull(linear or backward), kept, moving, outs)
        return outputs, jax.tree.unflatten(out_tree, found)

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _leaves_of(cotangents: Any, shape: Any) -> list[Any]:
    """The cotangents of the leaves of `shape`, zeros where a whole subtree is None."""
    found: list[Any] = []

    def add(cotangent: Any, types: Any) -> None:
        if cotangent is None:
            floats = [
                leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None for leaf in jax.tree.leaves(types)
            ]
            found.extend(leaf and jnp.zeros(leaf.shape, leaf.dtype) for leaf in floats)
        else:
            found.append(cotangent)

    jax.tree.map(add, tuple(cotangents), shape, is_leaf=lambda node: node is None)
    return found
