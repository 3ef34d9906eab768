"""A task head that the checkpoint lacks: trained whatever the method is, and started from a linear probe."""

from collections.abc import Mapping

import jax

from peftjax.backbone.backbone import Backbone, Params
from peftjax.core import tree
from peftjax.methods.selection.plain import unfreeze
from peftjax.models.families import FAMILIES
from peftjax.transform.chain import chain
from peftjax.transform.transform import Transform


def with_new_head(method: Transform, model: Backbone, params: Params) -> Transform:
    """The method, and plain training of the new parameters of the head that the method leaves frozen."""
    prefix = FAMILIES[model.config.model_type].heads[model.head_name].task_weights
    if prefix is None:
        return method
    frozen, _ = jax.eval_shape(method.init, jax.random.key(0), params)
    left = [
        path
        for path, leaf in tree.named_leaves(frozen.params).items()
        if path.startswith(prefix) and not isinstance(leaf, tree.Hole)
    ]
    return chain(method, unfreeze(left)) if left else method


def start_at_probe(
    method: Transform, model: Backbone, params: Params, weights: Mapping[str, jax.Array]
) -> Params:
    """The parameters with a linear probe instead of a newly drawn head on the same features.

    Fine-tuning from the probe moves the features less than from a random head (Kumar et al., ICLR
    2022, arXiv 2202.10054). A head that the method adapts instead of training it stays as it is: its
    frozen part could not be redrawn from the seed.
    """
    frozen, _ = jax.eval_shape(method.init, jax.random.key(0), params)
    head = {f"head/classifier/{name}": value for name, value in weights.items()}
    kept = tree.named_leaves(frozen.params)
    if model.head_name != "mean_classifier" or not all(isinstance(kept[path], tree.Hole) for path in head):
        return params
    return tree.replace(params, head)
