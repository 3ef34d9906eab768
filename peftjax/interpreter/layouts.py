"""How a model reads its weights, found by tracing it where their names do not tell."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, select
from peftjax.interpreter.evaluate import Evaluator
from peftjax.interpreter.rules import RULES
from peftjax.weights.contraction import Contraction, met_axes
from peftjax.weights.fields import structured
from peftjax.weights.layout import Layout, guess_layout
from peftjax.weights.low_rank import LowRank


@structured
class _EntersByInputs(LowRank):
    """A low-rank weight that is refused where an activation meets its outputs, or sums over its stack."""

    may_mix: ClassVar[bool] = False

    def supports(self, rule: Contraction) -> bool:
        """As the low-rank weight, but only where the inputs are contracted or looked up."""
        met = {self.layout.axes[p].kind for p in met_axes(rule)}
        return super().supports(rule) and not met & {"s", "o"}


def layouts_of(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    targets: Targets = ".*",
    exclude: Targets | None = None,
) -> dict[str, str]:
    """The axes of each targeted weight, by trying them on the model itself (traced, never run).

    Args:
        fn: `(params, *inputs) -> outputs`, any JAX function.
        params: its parameters, or their shapes.
        inputs: examples, or their shapes.
        targets: which weights, as in `lora`.
        exclude: what to leave out, in the same forms; wins over `targets`.

    Returns:
        `{pattern: letters}` for the option `layouts` of a method.

    Raises:
        PeftError: no reading of a weight fits, because the model uses it in a way that needs the dense
            array; the error is that of the most likely reading.

    Examples:
        >>> params = {"w": jnp.ones((2, 4, 8))}
        >>> heads = lambda params, x: jnp.einsum("bi,hio->bho", x, params["w"])
        >>> pj.layouts_of(heads, params, jnp.ones((3, 4)))
        {'^w': 'sio'}
    """
    leaves = tree.named_leaves(params)
    return {
        f"^{path}": _first_that_fits(fn, params, inputs, path, leaves)
        for path in select(params, targets, caller="layouts_of", exclude=exclude)
    }


def _first_that_fits(
    fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], path: str, leaves: dict[str, Any]
) -> str:
    shape = leaves[path].shape
    bias = getattr(leaves.get(f"{tree.module_of(path)}/bias"), "shape", None)
    guess = guess_layout(path, shape, bias)
    failure: PeftError | None = None
    readings = tuple(dict.fromkeys((guess, *_readings(len(shape)))))
    # First those in which activations meet the inputs alone: a matrix used as `x @ w.T` fits both ways. What
    # is used both ways, as a tied table is, keeps the reading that its name tells.
    for kind, letters in ((kind, letters) for kind in (_EntersByInputs, LowRank) for letters in readings):

        def traced(params: Any, *inputs: Any, letters: str = letters, kind: Any = kind) -> Any:
            leaf = tree.named_leaves(params)[path]
            layout = Layout.parse(letters, shape, path)
            a, b = (jnp.zeros((*layout.stack, 1, n), leaf.dtype) for n in layout.matrix)
            return Evaluator(RULES).trace(fn)(tree.replace(params, {path: kind(leaf, a, b, layout)}), *inputs)

        try:
            jax.eval_shape(traced, params, *inputs)
        except PeftError as error:
            failure = failure or error
        else:
            return letters
    assert failure is not None
    raise failure


def _readings(ndim: int) -> Iterator[str]:
    """Stacks, then inputs, then outputs (outputs before inputs last), fewest stacks first.

    And the kernels of transposed convolutions: the window, outputs, inputs.
    """
    for order in ("io", "oi"):
        for stacks in range(ndim - 1):
            for first in range(1, ndim - stacks):
                yield "s" * stacks + order[0] * first + order[1] * (ndim - stacks - first)
    if ndim > 2:
        yield "i" * (ndim - 2) + "oi"
