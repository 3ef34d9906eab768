"""The groups of a model: those that a backbone declares, or those that a function's trace shows."""

from collections.abc import Callable
from typing import Any

from peftjax.backbone.backbone import Backbone
from peftjax.core.errors import PeftError
from peftjax.prune.blocks import block_groups
from peftjax.prune.group import Group
from peftjax.prune.traced import traced_groups


def groups_of(model: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, Group]:
    """What can be removed from a model, each with all the axes of weights that go with it.

    Args:
        model: a backbone, such as `pj.load` gives: its heads, neurons, experts and layers; or any function
            `(params, *inputs) -> outputs`: the axes between its weights, by the first weight that makes them.
        params: its parameters, or their shapes.
        inputs: examples for a function's trace, or their shapes; a backbone needs none.

    Raises:
        PeftError: a function is given without inputs, or nothing of it can be removed.

    Examples:
        >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 3))}
        >>> mlp = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
        >>> groups = pj.prune.groups_of(mlp, params, jnp.ones((2, 4)))
        >>> [(name, group.kind, group.count) for name, group in groups.items()]
        [('up', 'neuron', 8)]
    """
    if isinstance(model, Backbone):
        return block_groups(model, params)
    if not inputs:
        raise PeftError("groups_of: a function is traced; give an example of each input after the parameters")
    found = traced_groups(model, params, *inputs)
    if not found:
        raise PeftError(
            "groups_of: no axis of this function can be cut: none lies between two of its weights without a "
            "norm, a sum or a constant over it"
        )
    return found
