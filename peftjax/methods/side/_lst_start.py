"""The parameters a side network starts with: pruned or random blocks, and fresh layers between the widths."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from peftjax.backbone.functional import linear_init
from peftjax.backbone.rewriting import BlockStack, stacks_of
from peftjax.core import naming, tree
from peftjax.core.errors import PeftError
from peftjax.methods._targets import key_for
from peftjax.methods.side._lst_pruning import Kept, Part, Rules, largest, prune_stack
from peftjax.weights.base import Weight

Scores = Mapping[str, Array]


def used_layers(method: str, side_layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The layers of a stack that the side network reads, by default all.

    Raises:
        PeftError: one of them is not a layer.
    """
    if side_layers is None:
        return tuple(range(num_layers))
    for layer in side_layers:
        if not 0 <= layer < num_layers:
            raise PeftError(f"{method}: side_layers names layer {layer} of a stack of {num_layers} layers")
    return tuple(side_layers)


def require_plain(method: str, params: Part) -> None:
    """Raise a PeftError if a weight to start from is a structured one."""
    for path, leaf in tree.named_leaves(params).items():
        if isinstance(leaf, Weight) and not path.startswith("head/"):
            raise PeftError(
                f"{method}: {path!r} is a {type(leaf).__name__} of an earlier method, from which no side "
                f"network can start; merge that method first, or let it change the side network: "
                f"{method}(side=...)"
            )


def _require_dense(method: str, params: Part) -> None:
    """Raise a PeftError for blocks of which no smaller ones are known."""
    for path in tree.named_leaves(params["blocks"]):
        if naming.is_of_experts(path) or path.endswith("/sinks"):
            raise PeftError(
                f"{method}: no smaller block of one with 'blocks/{path}' is known; take a side network "
                "without blocks (pj.unipt, pj.vqt), or a method of weights (pj.lora)"
            )


def start(
    method: str,
    key: Key[Array, ""],
    params: Part,
    scores: Scores | None,
    *,
    reduction: int,
    side_layers: Sequence[int] | None,
    random: bool,
) -> dict[str, Part]:
    """The side network of every stack, by its name: blocks, norm, layers from and to the backbone's width.

    Args:
        method: the method.
        key: draws the fresh layers, and the blocks where they are `random`.
        params: of the backbone.
        scores: of its parameters, by path; None is their magnitude.
        reduction: r.
        side_layers: the layers that are read, of each stack.
        random: whether the blocks' kernels are drawn, U(±1/√in), and their biases zero.

    Raises:
        PeftError: scores do not fit the parameters; the blocks have experts or sinks; as `stacks_of` and
            `used_layers`.
    """
    _require_dense(method, params)
    scored = _scored(method, params, scores)
    width = stacks_of(method, params)[0].width
    if reduction > width:
        raise PeftError(f"{method}: reduction {reduction} leaves nothing of a width of {width}")
    first = encoded = _embedded(params["embed"], scored["embed"], width, reduction)
    sides: dict[str, Part] = {}
    # The decoder's cross-attention reads what the encoder ends with.
    for stack in reversed(stacks_of(method, params)):
        part, own = (params, scored) if stack.name == "blocks" else (params["encoder"], scored["encoder"])
        norm = _last_norm(part["head"])
        rules = Rules(reduction, not _has_positions(params["embed"]), post_norm=norm is None)
        blocks, encoded = prune_stack(part["blocks"], own["blocks"], first, encoded, rules)
        used = np.asarray(used_layers(method, side_layers, stack.num_layers))
        blocks = jax.tree.map(lambda leaf, used=used: leaf[used].astype(jnp.float32), blocks)
        stack_key = key_for(key, stack.name)
        if random:
            blocks = _drawn(key_for(stack_key, "layers"), blocks)
        last = {} if norm is None else {"norm": {name: leaf[encoded] for name, leaf in norm.items()}}
        sides[stack.name] = {
            **_between(stack_key, stack, len(used), encoded.shape[0], params),
            "layers": blocks,
            **jax.tree.map(lambda leaf: leaf.astype(jnp.float32), last),
            **_positions(stack, params["embed"]),
        }
    return sides


def _between(key: Key[Array, ""], stack: BlockStack, used: int, width: int, params: Part) -> Part:
    """The layers from the backbone's width down to the side's, and from that of the last stack back up."""
    down = {
        "first": linear_init(key_for(key, "first"), (stack.width, width)),
        "down": linear_init(key_for(key, "down"), (used, stack.width, width)),
    }
    if stack.name == "encoder":
        return down
    return {**down, "up": linear_init(key_for(key, "up"), (width, stack.width))}


def _scored(method: str, params: Part, scores: Scores | None) -> Part:
    """Scores in the structure of embeddings and blocks, float32; of a bias or norm, which none reads, any."""
    parts = {name: params[name] for name in ("embed", "blocks")}
    if "encoder" in params:
        parts["encoder"] = {"blocks": params["encoder"]["blocks"]}

    def score(path: str, leaf: Array) -> Array:
        if scores is None or not naming.is_weight(path, leaf):
            return jnp.abs(leaf).astype(jnp.float32)
        if path not in scores or scores[path].shape != leaf.shape:
            raise PeftError(f"{method}: scores has no array of shape {leaf.shape} for {path!r}")
        return scores[path].astype(jnp.float32)

    return tree.map_named(score, parts)


def _embedded(embed: Part, scores: Part, width: int, reduction: int) -> Kept:
    """The columns of the embeddings that are kept: of all that give numbers of the stream."""
    total: Float[Array, " D"] = jnp.zeros(width)
    scored = tree.named_leaves(scores)
    for path, leaf in tree.named_leaves(embed).items():
        if naming.is_weight(path, leaf) and leaf.shape[-1] == width:
            total += scored[path].reshape(-1, width).sum(0)
    return largest(total, reduction)


def _has_positions(embed: Part) -> bool:
    """Whether positions are embedded; otherwise they rotate queries and keys."""
    return any("position" in name for name in embed)


def _last_norm(head: Part) -> Part | None:
    """The norm after a stack's last block, which stacks of post-norm blocks lack.

    That of a head of masked words comes after its `transform`, not after the blocks.
    """
    return None if "transform" in head else head.get("norm")


def _positions(stack: BlockStack, embed: Part) -> Part:
    """A copy of the stack's table of relative positions, where it has one."""
    names = ("encoder_positions",) if stack.name == "encoder" else ("decoder_positions", "encoder_positions")
    for name in names:
        if name in embed:
            return {"positions": {leaf: jnp.array(value, jnp.float32) for leaf, value in embed[name].items()}}
    return {}


def _drawn(key: Key[Array, ""], blocks: Part) -> Part:
    """The blocks with new linear layers."""
    drawn = {}
    for name, part in blocks.items():
        if not isinstance(part, Mapping):
            drawn[name] = part
        elif "kernel" in part:
            new = linear_init(key_for(key, name), part["kernel"].shape)["kernel"]
            drawn[name] = {leaf: new if leaf == "kernel" else jnp.zeros_like(part[leaf]) for leaf in part}
        else:
            drawn[name] = _drawn(key_for(key, name), part)
    return drawn
