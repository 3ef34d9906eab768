"""What a model may do with a structured weight."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.testing.comparisons import assert_close
from peftjax.testing.model import KEY
from peftjax.weights.base import Weight


def check_weight(weight: Weight, *, tolerance: float = 1e-5) -> None:
    """Check that a model may use a structured weight wherever it uses the array that it stands for.

    Products with its inputs and its outputs, lookups, casts and slices give what the dense array gives, or a
    PeftError, with and without `jit`; and so do the gradients of the activation and of the weight's own float
    arrays.

    Args:
        weight: with a layout; a stack's axes lead, as `jnp.matmul` has them.
        tolerance: of the largest number, in float32.

    Raises:
        AssertionError: it does not; the message says what failed.
    """
    matrix = weight.dense()
    assert (matrix.shape, matrix.dtype) == (tuple(weight.shape), weight.dtype), "shape or dtype of dense()"
    assert matrix.ndim >= 2, "a weight has at least two axes"
    *stack, n, m = matrix.shape
    entering, leaving = (0.3 * jax.random.normal(KEY, (*stack, 5, size)) for size in (n, m))
    uses: dict[str, tuple[Callable[..., Any], jax.Array]] = {
        "x @ w": (lambda w, x: x @ w, entering),
        "x @ w.T": (lambda w, x: x @ jnp.swapaxes(w, -1, -2), leaving),
        "x @ w in bfloat16": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), entering),
    }
    if not stack:
        rows = jnp.arange(5) % n
        uses["w[rows]"] = (lambda w, x: jnp.take(w, rows, axis=0) * x[:, :1], entering)
        uses["x @ w[:, :k]"] = (lambda w, x: x @ w[:, : max(1, m // 2)], entering)
    else:
        uses["x @ w[0]"] = (lambda w, x: x[0] @ w[0], entering)
    held = 0
    for name, (use, x) in uses.items():
        try:
            held += _acts_as_dense(name, use, weight, x, 5e-2 if "bfloat16" in name else tolerance)
        except PeftError:
            continue  # a use that it has no rule for
    assert held, "no use of it works: neither products nor lookups"


def _acts_as_dense(name: str, use: Callable[..., Any], weight: Weight, x: jax.Array, tolerance: float) -> int:
    """One use of a weight against that of its array: outputs and gradients."""

    def of_weight(weight: Weight, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = adapt(use)(weight, x).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    def of_dense(weight: Weight, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = use(weight.dense(), x).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    def both(fn: Callable[..., Any]) -> Any:
        grads = jax.value_and_grad(fn, (0, 1), has_aux=True, allow_int=True)
        (_, out), (of_parts, of_x) = jax.jit(grads)(weight, x)
        floats = [g for g in jax.tree.leaves(of_parts) if g.dtype != jax.dtypes.float0]
        return out, floats, of_x

    got, want = both(of_weight), both(of_dense)
    assert_close(adapt(use)(weight, x).astype(jnp.float32), want[0], tolerance, what=f"{name}, without jit")
    assert_close(got, want, tolerance, what=name)
    return 1
