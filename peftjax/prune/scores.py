"""How much each entry of a weight matters, and with it each unit of a group.

All are pure functions of arrays, by path, of the weights' shapes; statistics come from `pj.calibrate`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import one_of
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, select
from peftjax.prune.group import Group, Groups, Member
from peftjax.weights.base import dense
from peftjax.weights.canonical import side_to_logical, to_canonical, to_logical
from peftjax.weights.layout import layout_of

Arrays = Mapping[str, Array]
Normalize = Literal["none", "l2", "range"]
_TINY = 1e-8


def magnitude(
    params: Any, *, targets: Targets = "all-linear", exclude: Targets | None = None
) -> dict[str, Array]:
    """`|w|` of each entry.

    Args:
        params: the parameters.
        targets: as in `lora`.
        exclude: what to leave out, in the same forms; wins over `targets`.

    Raises:
        PeftError: nothing is matched.
    """
    leaves = tree.named_leaves(params)
    paths = select(params, targets, caller="magnitude", exclude=exclude)
    return {path: jnp.abs(_wide(leaves[path])) for path in paths}


def wanda(params: Any, moments: Arrays, *, layouts: Mapping[str, str] | None = None) -> dict[str, Array]:
    """`|w_ij| · √E x_i²` of each entry (Sun et al., "Wanda", ICLR 2024, arXiv 2306.11695).

    Args:
        params: the parameters.
        moments: `[*stack, in, in]` by path, of `pj.calibrate.input_statistics`.
        layouts: as in `lora`.

    Raises:
        PeftError: a moment is of no parameter.
    """
    leaves = _known("wanda", params, moments)
    found = {}
    for path, moment in moments.items():
        layout = layout_of(path, leaves, layouts)
        lengths = jnp.sqrt(jnp.diagonal(moment, axis1=-2, axis2=-1))
        found[path] = jnp.abs(_wide(leaves[path])) * side_to_logical(lengths, layout, "i")
    return found


def beta_rank(
    params: Any, means: Arrays, moments: Arrays, *, layouts: Mapping[str, str] | None = None
) -> dict[str, Array]:
    """`|w_ij| · σ(y_j) / σ(x)` of each entry; an output's score is the mean over its own (Beta-Rank, 2023).

    σ(y) of an output follows from the inputs' covariance; σ(x) is over the inputs and the tokens together.
    Where x does not vary the score is 0.

    Args:
        params: the parameters.
        means: `[*stack, in]` by path, of `pj.calibrate.input_statistics`.
        moments: `[*stack, in, in]` likewise.
        layouts: as in `lora`.

    Raises:
        PeftError: a moment is of no parameter.
    """
    leaves = _known("beta_rank", params, moments)
    found = {}
    for path, moment in moments.items():
        layout, mean = layout_of(path, leaves, layouts), means[path]
        w = to_canonical(_wide(leaves[path]), layout)
        covariance = moment - mean[..., :, None] * mean[..., None, :]
        of_outputs = jnp.einsum("...io,...ij,...jo->...o", w, covariance, w, precision="highest")
        squares = jnp.diagonal(moment, axis1=-2, axis2=-1).mean(-1) - mean.mean(-1) ** 2
        spread = jnp.sqrt(jnp.maximum(squares, 0))[..., None, None]
        ratio = jnp.sqrt(jnp.maximum(of_outputs, 0))[..., None, :] / jnp.where(spread > 0, spread, 1)
        found[path] = to_logical(jnp.where(spread > 0, jnp.abs(w) * ratio, 0), layout)
    return found


def taylor(params: Any, gradients: Arrays, *, fisher: Arrays | None = None) -> dict[str, Array]:
    """`|g w|` of each entry, or `|g w - F w² / 2|`: what the loss changes by without it, to that order.

    Paper: Ma et al., "LLM-Pruner", NeurIPS 2023, arXiv 2305.11627.

    Args:
        params: the parameters, structured weights included, whose values are then used.
        gradients: of the loss by path, of `pj.calibrate.mean_gradient` or `lora_gradients`.
        fisher: F by path, of `pj.calibrate.fisher_information` over the number of examples.

    Raises:
        PeftError: a gradient is of no parameter.
    """
    leaves = _known("taylor", params, gradients)
    found = {}
    for path, gradient in gradients.items():
        w = _wide(leaves[path])
        change = gradient * w
        found[path] = jnp.abs(change if fisher is None else change - fisher[path] * jnp.square(w) / 2)
    return found


def lora_gradients(
    params: Any,
    trainable: Mapping[str, Arrays],
    gradients: Mapping[str, Arrays],
    *,
    layouts: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """What stands for the gradient of each weight with low-rank factors, from theirs alone (LoRAPrune).

        G = aᵀ b - (a - g_a)ᵀ (b - g_b) = aᵀ g_b + g_aᵀ b - g_aᵀ g_b

    which a step of SGD of size 1 takes from `aᵀ b`; no gradient of a dense weight is formed in a backward
    pass. Under `jit` with the score and `pooled`, G itself need not be stored either.

    Paper: Zhang et al., "LoRAPrune", Findings of ACL 2024, arXiv 2305.18403.

    Args:
        params: the base, or its shapes.
        trainable: factors a `[*stack, r, in]` and b `[*stack, r, out]` by path, of `lora` and its relatives.
        gradients: of them, in the same tree.
        layouts: as in `lora`.

    Raises:
        PeftError: none of the trained arrays are such factors, or they are of no parameter.
    """
    factors = {path: own for path, own in trainable.items() if {"a", "b"} <= set(own)}
    if not factors:
        raise PeftError("lora_gradients: no weight has factors 'a' and 'b'; train it with pj.lora")
    leaves = _known("lora_gradients", params, factors)
    found = {}
    for path, own in factors.items():
        a, b = (own[name].astype(jnp.float32) for name in ("a", "b"))
        g_a, g_b = (gradients[path][name].astype(jnp.float32) for name in ("a", "b"))
        product = jnp.einsum("...ri,...ro->...io", a, g_b) + jnp.einsum("...ri,...ro->...io", g_a, b - g_b)
        found[path] = to_logical(product, layout_of(path, leaves, layouts))
    return found


def pooled(
    scores: Arrays,
    groups: Groups,
    *,
    reduce: Literal["sum", "mean"] = "sum",
    normalize: Normalize = "none",
    reads: bool | None = None,
) -> dict[str, Array]:
    """The scores of units `[*stack, count]` from those of entries, over all the weights of a group.

    Args:
        scores: of entries, by path; a group takes those of its weights that have some, and at least one.
        groups: of `groups_of`.
        reduce: how a unit's entries of one weight become a number.
        normalize: what is done to each weight's numbers before they are added: "l2" divides those of each
            layer by their length (LoRAPrune), "range" brings them to [0, 1] (Beta-Rank).
        reads: only the weights that read a unit, or only those that make it; None is both.

    Raises:
        PeftError: a group has no weight with scores.
    """
    one_of("pooled", "reduce", reduce, ("sum", "mean"))
    one_of("pooled", "normalize", normalize, ("none", "l2", "range"))
    found = {}
    for name, group in groups.items():
        own = [
            _normalized(_of_member(scores[member.path], member, group, reduce), normalize)
            for member in group.members
            if member.path in scores and reads in (None, member.reads)
        ]
        if not own:
            paths = ", ".join(repr(member.path) for member in group.members[:3])
            raise PeftError(f"pooled: no weight of the group {name!r} has scores; give those of {paths}")
        found[name] = sum(own[1:], own[0])
    return found


def _of_member(entries: Array, member: Member, group: Group, reduce: str) -> Array:
    lead = len(group.stack)
    others = tuple(n for n in range(lead, entries.ndim) if n != member.axis)
    places = member.places(group.count)
    along = jnp.sum(entries, axis=others) if reduce == "sum" else jnp.mean(entries, axis=others)
    own = jnp.take(along, np.ravel(places), axis=-1).reshape(*along.shape[:-1], *places.shape)
    return own.sum((-3, -1)) if reduce == "sum" else own.mean((-3, -1))


def _normalized(scores: Array, how: Normalize) -> Array:
    if how == "l2":
        return scores / (jnp.linalg.norm(scores, axis=-1, keepdims=True) + _TINY)
    if how == "range":
        low, high = scores.min(-1, keepdims=True), scores.max(-1, keepdims=True)
        return (scores - low) / jnp.maximum(high - low, _TINY)
    return scores


def _wide(leaf: Any) -> Array:
    return dense(leaf).astype(jnp.float32)


def _known(caller: str, params: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    leaves = tree.named_leaves(params)
    for path in given:
        if path not in leaves:
            raise PeftError(
                f"{caller}: no parameter is called {path!r}; closest: {tree.nearest(path, leaves)}"
            )
    return leaves
