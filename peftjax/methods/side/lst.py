"""LST: a small network beside the backbone, fed by it and trained instead of it.

Sung, Cho and Bansal, "LST: Ladder Side-Tuning", NeurIPS 2022, arXiv 2206.06522.

    h_0 = embeddings,   h_i+1 = Block_i(h_i)                                        [B, S, D], frozen
    s = h_0 W_first + b_first                                                       [B, S, d], d = D / r
    for every used layer i:
        s = μ_i s + (1 - μ_i) (h_i+1 W_down,i + b_down,i)                           μ_i = sigmoid(a_i / T)
        s = SideBlock_i(s)                                                          the family's, d wide
    outputs = head(norm(s) W_up + b_up)

Trained: the side network alone, about 4 d² + 2 d F / r and D d numbers a used layer; it does not merge.
Backward keeps h_0 and h_i+1 of the used layers, in the compute dtype, and what the side's blocks keep of
width d; no gradient is computed through the backbone, of which only the head may be trained beside it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.rewriting import require_backbone, require_scan, stacks_of
from peftjax.core import tree
from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.methods.side._lst_ladder import BothStates, Ladder, SideEmbed
from peftjax.methods.side._lst_start import require_plain, start
from peftjax.transform.around import Around, with_frozen
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, GradientCut, Transform

NAME = "lst"
INITS = ("fisher", "magnitude", "random", "loaded")


@register(
    kind="adapter",
    paper="LST, Sung et al. 2022, arXiv 2206.06522",
    trains="4 d² + 2 d F / r + D d a used layer, d = D / r",
    backward_keeps="the states after the used layers, and a network of width d; none of the backbone's",
    mergeable=False,
    quantized_base=False,
    of_blocks=True,
    conformance=Conformance(example={"reduction": 2}, starts_as_base=False),
)
def lst(
    *,
    reduction: int = 8,
    side_layers: Sequence[int] | None = None,
    gate: Literal["learned", "sum"] = "learned",
    temperature: float = 0.1,
    merge_last: bool = False,
    init: Literal["fisher", "magnitude", "random", "loaded"] = "magnitude",
    scores: Mapping[str, Array] | None = None,
    side: Transform | None = None,
    backbone_dropout: bool = True,
) -> Transform:
    """Ladder side-tuning (arXiv 2206.06522).

    Dropout in both networks is the family's, when the model is given a key.

    Args:
        reduction: r, a divisor of the heads' width, and of its half with rotary positions.
        side_layers: numbers of the layers that have a side block, in each stack; None is all.
        gate: "learned", as above; "sum" adds the two without a weight.
        temperature: T.
        merge_last: mix h_L into what the head reads, by a gate of its own.
        init: what prunes the backbone: "fisher", by `scores`; "magnitude", by the size of the weights;
            "random" draws the blocks' linear layers U(±1/√in) and copies only norms. What is pruned by
            scores is saved as "loaded": the numbers come from the saved adapter, and are those of
            "magnitude" where there is none.
        scores: by path, from `fisher_information`.
        side: a method that is applied to the side network's parameters, the rest of which stays as it
            started: `pj.lora(rank=4)`, or `pj.chain(pj.lora(...), pj.unfreeze([...]))`. By default all of
            them are trained. Their paths begin with "blocks/", and "encoder/" in an encoder-decoder.
        backbone_dropout: whether the backbone drops out too; the head that reads the side network does.

    Raises:
        PeftError: here for a setting out of range; in `init` when the parameters are not a backbone's, an
            earlier method changed one of them, or a layer or score does not fit; in `model` when it is not a
            backbone, another method changes how it is run, or r does not divide the heads' width; in a
            chain's `init` when another method trains something in the backbone but its head.
    """
    _check(reduction, side_layers, gate, temperature, init, scores)
    if side is not None and (side.advances or side.placement is not None):
        raise PeftError(
            f"{NAME}: side={side.name!r} changes itself or its base between steps, which a side network "
            "cannot; use a method such as pj.lora, pj.dora or pj.unfreeze"
        )
    used = None if side_layers is None else sorted({int(layer) for layer in side_layers})
    config = {"side_layers": used, "init": "loaded" if init == "fisher" else init}

    def fresh(key: Array, params: Params) -> Trainable:
        require_plain(NAME, params)
        options = {"reduction": reduction, "side_layers": used, "random": init == "random"}
        sides = start(NAME, key, params, scores, **options)
        for part in sides.values():
            if gate == "learned":
                part["gate"] = jnp.zeros(len(part["down"]["bias"]))
        if merge_last:
            sides["blocks"]["merge"] = jnp.zeros(())
        return sides

    def init_side(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        key, inner_key = jax.random.split(key)
        stacks_of(NAME, params)
        sides = fresh(key, params)
        if side is None:
            return Frozen(params), sides
        frozen, trainable = side.init(inner_key, sides)
        return Frozen(params, *_stored(sides, frozen)), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        sides = trainable
        if side is not None:
            sides = side.apply(_restored(frozen), trainable, key=key)
        return _added(frozen.params, sides)

    def model(forward: Forward) -> Forward:
        backbone = require_backbone(NAME, forward)
        ladder = {
            "reduction": reduction,
            "side_layers": None if used is None else tuple(used),
            "gated": gate == "learned",
            "temperature": temperature,
            "backbone_dropout": backbone_dropout,
        }
        encoder = None
        if backbone.encoder is not None:
            encoder = _laddered(backbone.encoder, **ladder, merge_last=False, encodes=True)
            encoder = dataclasses.replace(encoder, head=BothStates(encoder.head, backbone_dropout))
        return dataclasses.replace(_laddered(backbone, **ladder, merge_last=merge_last), encoder=encoder)

    around = None if side is None else side.around
    if around is not None:
        around = Around(*(with_frozen(tx, _restored) for tx in (around.gradients, around.updates)))
    cut = GradientCut(f"let it change the side network: {NAME}(side=...)")
    return Transform(NAME, config, init_side, apply, model, around=around, cut=cut)


def _laddered(backbone: Backbone, *, reduction: int, **settings: Any) -> Backbone:
    """The backbone of one stack with its side network."""
    require_scan(NAME, backbone)
    config = backbone.block.config
    halves = 2 if config.rotary else 1
    if config.head_width % (halves * reduction):
        of = (
            "half of the heads' width, whose pairs rotary positions turn,"
            if config.rotary
            else "the heads' width"
        )
        raise PeftError(
            f"{NAME}: reduction {reduction} does not divide {of} {config.head_width // halves}; "
            "take a divisor of it"
        )
    ladder = Ladder(NAME, backbone.stack, reduction, **settings)
    embed = SideEmbed(backbone.embed, NAME, settings["backbone_dropout"])
    return dataclasses.replace(backbone, stack=ladder, embed=embed)


def _added(params: Params, sides: Mapping[str, Params]) -> Params:
    """The parameters with those of the side networks; tables of positions lie with the embeddings."""
    if NAME in params:
        raise PeftError(f"chain: {NAME!r} rewrites the blocks twice; leave one of the two out")
    tables = {}
    for stack, side in sides.items():
        if "positions" in side:
            both = "encoder" in sides
            tables["decoder_positions" if both and stack == "blocks" else "encoder_positions"] = side[
                "positions"
            ]
    parts = {
        stack: {name: own for name, own in side.items() if name != "positions"}
        for stack, side in sides.items()
    }
    params = {**params, NAME: parts["blocks"]}
    if tables:
        params["embed"] = {**params["embed"], NAME: tables}
    if "encoder" in parts:
        params["encoder"] = {**params["encoder"], NAME: parts["encoder"]}
    return params


def _stored(sides: Trainable, frozen: Frozen) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """State and plan that hold what a method of the side network keeps fixed, arrays alone in the state."""
    before = tree.named_leaves(sides)
    holes = [path for path, leaf in tree.named_leaves(frozen.params).items() if isinstance(leaf, tree.Hole)]
    whole = tree.replace(frozen.params, {path: before[path] for path in holes})
    return {"side": whole, "inner": frozen.state}, (tuple(holes), frozen.plan)


def _restored(frozen: Frozen) -> Frozen:
    """Undo `_stored`."""
    holes, plan = frozen.plan
    side = tree.replace(frozen.state["side"], dict.fromkeys(holes, tree.Hole()))
    return Frozen(side, frozen.state["inner"], plan)


def _check(
    reduction: int,
    side_layers: Sequence[int] | None,
    gate: str,
    temperature: float,
    init: str,
    scores: Mapping[str, Array] | None,
) -> None:
    positive(NAME, "reduction", reduction)
    if side_layers is not None and not len(side_layers):
        raise PeftError(f"{NAME}: side_layers names no layer; give at least one, or None for all")
    one_of(NAME, "gate", gate, ("learned", "sum"))
    positive(NAME, "temperature", temperature)
    one_of(NAME, "init", init, INITS)
    if (init == "fisher") != (scores is not None):
        raise PeftError(
            f"{NAME}: init {init!r} and scores do not go together; scores, from "
            "peftjax.fisher_information, are for the init 'fisher'"
        )
