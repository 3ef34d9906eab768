"""`adapt`: trace a function on arrays, run it on structured weights."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from peftjax.interpreter.evaluate import Evaluator
from peftjax.interpreter.layouts import layouts_of
from peftjax.interpreter.rules import RULES

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["adapt", "layouts_of"]


def adapt(fn: F, *, allow_dense: Sequence[str] = ()) -> F:
    """`fn`, taking structured weights anywhere in its arguments where it expects arrays.

    `fn` is traced on abstract arrays of the weights' logical shapes, and the equations that touch a
    weight are evaluated by the weight's own rule: `x·w` in any `dot_general`, convolution, embedding
    lookup or ragged product, through transposes, reshapes, casts, slices of layers and experts, and
    through `jit`, `scan`, `remat`, `while`, `cond`, `custom_jvp`, `custom_vjp` and `shard_map`. It
    costs trace time only and composes with `jit`, `grad` and `vmap` from outside.

    A `custom_vjp` (or `custom_jvp`) that takes a weight as an argument keeps its rule; what that rule
    returns for the weight is the gradient of the dense array, which is then pulled back to the parts.

    Args:
        fn: any JAX function: plain JAX, a Flax `apply`, an NNX merge and call, an Equinox module.
        allow_dense: regular expressions over primitive names and parameter paths for which forming
            the dense weight is accepted.

    Raises:
        PeftError: when called, if an equation outside `allow_dense` needs the dense weight; it names
            the parameter, the primitive and the source line.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.lora(rank=2, targets=["up"])
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> forward = pj.adapt(lambda params, x: x @ params["up"]["kernel"])
        >>> forward(method.apply(frozen, trainable), jnp.ones((3, 4))).shape
        (3, 8)
    """
    return Evaluator(RULES, tuple(allow_dense)).trace(fn)  # type: ignore[return-value]
