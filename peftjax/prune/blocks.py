"""The groups of a backbone: heads, neurons and experts of its blocks, and the layers themselves."""

from collections.abc import Mapping
from typing import Any

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.protocols import Params
from peftjax.core import tree
from peftjax.prune.group import Group, Member

ENCODER = "encoder/"
CROSS = "cross_attention/"
LINEAR = ("kernel", "bias")


def block_groups(model: Backbone, params: Params) -> dict[str, Group]:
    """The groups of a backbone by name: "heads", "neurons", "experts" and "layers".

    Those of an encoder's blocks begin with "encoder/", and the heads of cross-attention are
    "cross_attention/heads". A head is one of the keys and values with all the queries that read it. Where
    heads have a table of positions that all layers share (T5), one choice is for all layers; neurons of
    experts are chosen in each expert.
    """
    found = _of_stack(model, params, "")
    if model.encoder is not None:
        encoder = {**params["encoder"], "embed": params["embed"]}
        found |= _of_stack(model.encoder, encoder, ENCODER)
    return found


def _of_stack(model: Backbone, params: Params, prefix: str) -> dict[str, Group]:
    config, depth = model.block.config, model.num_layers
    leaves = {f"{prefix}blocks/{path}": leaf for path, leaf in tree.named_leaves(params["blocks"]).items()}
    tables = tree.named_leaves(params["embed"])
    found = {}
    for branch in ("", CROSS) if config.cross_attention else ("",):
        members = _heads(config, leaves, f"{prefix}blocks/{branch or 'attention/'}")
        table = f"embed/{'encoder' if prefix or model.encoder is None else 'decoder'}_positions/embedding"
        shared = not branch and table.removeprefix("embed/") in tables
        if shared:
            members = (*members, Member(table, 1))
        found[f"{prefix}{branch}heads"] = Group("head", members, config.kv_heads, () if shared else (depth,))
    experts = config.experts
    if experts is None:
        found[f"{prefix}neurons"] = _neurons(leaves, f"{prefix}blocks/feed_forward/", config, (depth,))
    else:
        inner = f"{prefix}blocks/feed_forward/experts/"
        found[f"{prefix}neurons"] = _neurons(leaves, inner, config, (depth, experts.count))
        router = f"{prefix}blocks/feed_forward/router/"
        members = tuple(
            Member(path, leaf.ndim - 1) for path, leaf in leaves.items() if path.startswith(router)
        )
        members += tuple(Member(path, 1, reads=True) for path in leaves if path.startswith(inner))
        found[f"{prefix}experts"] = Group("expert", members, experts.count, (depth,))
    found[f"{prefix}layers"] = Group("layer", tuple(Member(path, 0) for path in leaves), depth)
    return found


def _heads(config: BlockConfig, leaves: Mapping[str, Any], inside: str) -> tuple[Member, ...]:
    width, keys = config.head_width, config.kv_heads
    queries = config.num_heads // keys  # of each head of keys
    members = []
    for name, block in (("query", queries * width), ("key", width), ("value", width)):
        for leaf in LINEAR:
            if (path := f"{inside}{name}/{leaf}") in leaves:
                members.append(Member(path, leaves[path].ndim - 1, block))
    starts = {0: queries * width, keys * queries * width: width, keys * (queries + 1) * width: width}
    for leaf in LINEAR:
        if (path := f"{inside}qkv/{leaf}") in leaves:
            axis = leaves[path].ndim - 1
            members += [Member(path, axis, block, start) for start, block in starts.items()]
    if (path := f"{inside}sinks") in leaves:
        members.append(Member(path, 1, queries))
    return (*members, Member(f"{inside}output/kernel", 1, queries * width, reads=True))


def _neurons(leaves: Mapping[str, Any], inside: str, config: BlockConfig, stack: tuple[int, ...]) -> Group:
    makers = [f"{inside}{name}/{leaf}" for name in ("up", "gate") for leaf in LINEAR]
    members = [Member(path, leaves[path].ndim - 1) for path in makers if path in leaves]
    if (path := f"{inside}idle") in leaves:
        members.append(Member(path, 1))
    down = Member(f"{inside}down/kernel", len(stack), reads=True)
    return Group("neuron", (*members, down), config.inner_size, stack)
