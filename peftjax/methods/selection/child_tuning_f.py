"""Child-tuning_F: fine-tuning of which each step reaches a random part of the parameters.

Paper: Xu et al., "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
EMNLP 2021, arXiv 2109.05687.

    g' = g ∘ M / p,   M ~ Bernoulli(p) for each number, drawn anew in each step, before the optimizer

Trained: the matched parameters themselves. M follows from `seed` and the number of the step, and is not
stored. The backward pass is that of `unfreeze`. Default: p = 0.3.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.checks import positive_share
from peftjax.core.targets import Targets
from peftjax.methods._targets import key_for
from peftjax.methods.selection.plain import unfreeze
from peftjax.transform.around import Around
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


class Count(NamedTuple):
    """How many steps have been done, int32."""

    count: Array


@register(
    kind="selection",
    paper="Child-tuning_F, Xu et al. 2021, arXiv 2109.05687",
    trains="the matched parameters, a random share of them in a step",
    backward_keeps="the inputs of matched kernels",
    quantized_base=False,
    conformance=Conformance(example={"share": 0.9, "targets": r".*(kernel|norm|scale|bias).*"}),
)
def child_tuning_f(
    *, share: float = 0.3, targets: Targets = ".*", exclude: Targets | None = None, seed: int = 0
) -> Transform:
    """Train a random share of the matched parameters in each step (arXiv 2109.05687).

    Args:
        share: p.
        targets: as in `unfreeze`; by default everything.
        exclude: what to leave out, in the same forms; wins over `targets`.
        seed: of the masks.

    Raises:
        PeftError: for a share out of range; in `init` as `unfreeze`.
    """
    positive_share("child_tuning_f", "share", share)
    return replace(unfreeze(targets, exclude=exclude), around=Around(gradients=random_masks(share, seed)))


def random_masks(share: float, seed: int) -> optax.GradientTransformationExtraArgs:
    """Zero all but a random share of the gradients, and divide by the share."""

    def init(params: Any) -> Count:
        return Count(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Count, params: Any = None, **extra: Any) -> tuple[Any, Count]:
        key = jax.random.fold_in(jax.random.key(seed), state.count)

        def masked(path: Any, g: Array) -> Array:
            own = key_for(key, jax.tree_util.keystr(path))
            return jnp.where(jax.random.bernoulli(own, share, g.shape), g / share, jnp.zeros_like(g))

        return jax.tree_util.tree_map_with_path(masked, updates), Count(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)
