"""Statistics of what enters linear layers, over a few batches: their means and second moments."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.calibrate._observing import observed_sums
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets
from peftjax.interpreter import adapt
from peftjax.weights.layout import Layout
from peftjax.weights.observed import Observed, observed

Forward = Callable[[Any, Any], Any]
"""`(params, batch) -> outputs`, any tree of arrays."""
_CALLER = "input_statistics"


@dataclass(frozen=True)
class InputStatistics:
    """Of each weight by path, float32, over the rows that met its inputs, such as tokens.

    Attributes:
        counts: how many rows, `[*stack]`.
        means: of x, `[*stack, in]`.
        moments: the means of xᵀx, `[*stack, in, in]`.
    """

    counts: dict[str, Array] = field(default_factory=dict)
    means: dict[str, Array] = field(default_factory=dict)
    moments: dict[str, Array] = field(default_factory=dict)

    @property
    def covariances(self) -> dict[str, Array]:
        """The second moments around the means, `[*stack, in, in]`."""
        return {
            path: moment - jnp.einsum("...i,...j->...ij", self.means[path], self.means[path])
            for path, moment in self.moments.items()
        }


def input_statistics(
    forward: Forward,
    params: Any,
    batches: Iterable[Any],
    *,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    mask: Callable[[Any], Array] | None = None,
) -> InputStatistics:
    """Means and second moments of what enters the targeted weights.

    Each batch takes the time of a forward and a backward pass without the gradients of weights, and the
    memory of the matrices `[in, in]` of all targets: those that read the same activation have one each.

    Args:
        forward: the model, of plain parameters or structured ones.
        params: its parameters.
        batches: a calibration set.
        targets: as in `lora`; linear layers alone.
        exclude: what to leave out, in the same forms; wins over `targets`.
        mask: which rows of a batch count, such as tokens that are no padding; an array of the shape of the
            activations without their last axis.

    Raises:
        PeftError: nothing is matched, a target is used otherwise than as a linear layer or does not reach the
            output, the mask has another shape, or there is no batch.
    """
    run = adapt(forward)

    def value(params: Any, batch: Any) -> Array:
        out = run(params, batch)
        real = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in real), jnp.zeros(()))

    def observe(leaf: Any, layout: Layout, mask: Array | None) -> dict[str, Observed]:
        return {"inputs": observed(leaf, layout, mask)}

    where = {"targets": targets, "exclude": exclude, "mask": mask}
    total = observed_sums(_CALLER, value, params, batches, observe, **where)
    found = InputStatistics()
    for path, sums in total.items():
        own = sums["inputs"]
        if not bool((own["count"] > 0).all()):
            raise PeftError(f"{_CALLER}: no row of {path!r} reaches the model's output; exclude it")
        count = own["count"]
        found.counts[path] = count
        found.means[path] = own["sum"] / count[..., None]
        found.moments[path] = own["moment"] / count[..., None, None]
    return found
