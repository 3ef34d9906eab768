"""MEFT: a pre-trained transformer made reversible by inserting adapters.

Liao, Tan and Monz, NeurIPS 2023, arXiv 2306.00477. Two streams x1, x2 [B, S, D], which both start as the
embeddings:  y1 = λ x1 + F(x2),  y2 = β x2 + G(y1),  output (x1 + x2) / 2

    variant   F                                G                               next (x1, x2)   λ     β
    1         layer, adapter a beside its      adapter r                       (y2, y1)        0.1   1
              feed-forward
    2         adapter r                        the layer, as F of variant 1    (y2, y1)        1     0.1
    3         attention, adapter after it      feed-forward, adapter a         (y1, y2)        0.1   0.1

Trained: 2 (2 D r + D + r) numbers a layer, and half as many more in variant 3 with cross-attention. Backward
keeps two float32 streams after the last layer and after every `anchor_every` layers below it; it recomputes
a layer's inputs from its outputs, whose rounding errors `meft_check` measures.
"""

import dataclasses
from typing import Any

import jax
from jax import Array

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.rewriting import add_to_blocks, require_scan, rewrite_stacks, stacks_of
from peftjax.core.checks import at_least, one_of, positive
from peftjax.methods._targets import key_for
from peftjax.methods.bottleneck._bottleneck import ACTIVATIONS, AdapterBlock, Adapters, Bottleneck
from peftjax.methods.reversible._reversible_stack import ADAPTER, Part, ReversibleStack
from peftjax.methods.reversible.check import warn_of_inexact
from peftjax.ops.reversible import Coupling
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform

NAME = "meft"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between MEFT 1, 2 and 3.

    Attributes:
        f: F.
        g: G.
        coupling: with the released λ and β.
        anchor_every: the default where the backbone computes in float32, and where in a shorter dtype.
        adapters: the form of each adapter by its place.
    """

    f: Part
    g: Part
    coupling: Coupling
    anchor_every: tuple[int, int]
    adapters: dict[str, str]


_OF_LAYER = {"feed_forward": "parallel", ADAPTER: "sequential"}
VARIANTS = {
    1: Variant("block", ADAPTER, Coupling(0.1, 1.0, swap=True), (4, 2), _OF_LAYER),
    2: Variant(ADAPTER, "block", Coupling(1.0, 0.1, swap=True), (3, 1), _OF_LAYER),
    3: Variant(
        "attention",
        "feed_forward",
        Coupling(0.1, 0.1, swap=False),
        (2, 1),
        {"attention": "sequential", "feed_forward": "parallel"},
    ),
}
# Names of a model's activations that a bottleneck knows by another one.
_SAME_ACTIVATION = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}


@register(
    kind="adapter",
    paper="MEFT, Liao et al. 2023, arXiv 2306.00477",
    trains="2 (2 D r + D + r) a layer",
    backward_keeps="two float32 streams every few layers, and nothing of a layer",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"size": 2}, starts_as_base=False),
)
def meft(
    *,
    variant: int = 1,
    size: int = 8,
    lam: float | None = None,
    beta: float | None = None,
    anchor_every: int | None = None,
    num_reversible: int | None = None,
    activation: str | None = None,
    dropout: float = 0.0,
) -> Transform:
    """A reversible stack by inserted adapters (arXiv 2306.00477).

    Args:
        variant: 1, 2 or 3, what F and G are.
        size: r, the width of an adapter.
        lam: λ; default that of the variant.
        beta: β; default that of the variant.
        anchor_every: how many layers lie between two pairs of streams that are kept; 0 keeps the last
            pair alone, 1 inverts nothing; default that of the variant.
        num_reversible: how many layers, from the lowest on, are reversible; those above run by ordinary
            backpropagation, on a copy of their parameters unless they are all; default all.
        activation: "relu", "gelu", "gelu_new", "silu" or "tanh"; default that of the model's
            feed-forward, "gelu" where it is none of these.
        dropout: of the adapters, after the activation.

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, when it is not a backbone's or
            another method runs its blocks already.
    """
    one_of(NAME, "variant", variant, VARIANTS)
    chosen = VARIANTS[variant]
    coupling = Coupling(
        chosen.coupling.lam if lam is None else lam,
        chosen.coupling.beta if beta is None else beta,
        chosen.coupling.swap,
    )
    positive(NAME, "lam", coupling.lam)  # or nothing could be inverted
    positive(NAME, "beta", coupling.beta)
    at_least(NAME, "anchor_every", anchor_every, 0)
    at_least(NAME, "num_reversible", num_reversible, 0)
    shapes = {
        place: Bottleneck(size, form, activation=activation or "gelu", dropout=dropout, init_as="bert")
        for place, form in chosen.adapters.items()
    }
    alone = shapes.pop(ADAPTER, None)
    inside = Adapters(**shapes)
    for part in (inside, alone):
        if part is not None:
            part.require_valid(NAME)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        trainable: dict[str, Any] = {}
        for stack in stacks_of(NAME, params):
            trainable[stack.name] = inside.init(key, stack)
            if alone is not None:
                own_key = key_for(key, f"{stack.name}/{ADAPTER}")
                trainable[stack.name][ADAPTER] = alone.init(own_key, stack.num_layers, stack.width)
        return Frozen(params), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        added = {}
        for number, stack in enumerate(stacks_of(NAME, frozen.params)):
            added[stack.name] = dict(trainable[stack.name])
            if key is not None and dropout:
                keys = jax.random.split(jax.random.fold_in(key, number), stack.num_layers)
                added[stack.name]["key"] = keys
        return add_to_blocks(NAME, frozen.params, added)

    def model(forward: Forward) -> Forward:
        def rewrite(backbone: Backbone) -> Backbone:
            require_scan(NAME, backbone)
            of_float32, of_shorter = chosen.anchor_every
            every = of_float32 if backbone.dtype == "float32" else of_shorter
            every = every if anchor_every is None else anchor_every
            name = activation or _activation_of(backbone)
            block = AdapterBlock(backbone.block, NAME, _activated(inside, name))
            own = None if alone is None else dataclasses.replace(alone, activation=name)
            stack = ReversibleStack(
                NAME, chosen.f, chosen.g, coupling, every, own, num_reversible, backbone.stack
            )
            return dataclasses.replace(backbone, block=block, stack=stack)

        return rewrite_stacks(NAME, forward, rewrite)

    config = {"lam": coupling.lam, "beta": coupling.beta}
    return Transform(NAME, config, init, apply, model, checks=(warn_of_inexact,))


def _activated(adapters: Adapters, activation: str) -> Adapters:
    """The adapters with that activation."""
    parts = {"attention": adapters.attention, "feed_forward": adapters.feed_forward}
    changed = {
        branch: dataclasses.replace(part, activation=activation)
        for branch, part in parts.items()
        if part is not None
    }
    return Adapters(**changed)


def _activation_of(backbone: Backbone) -> str:
    name = getattr(backbone.block.config, "activation", None)
    name = _SAME_ACTIVATION.get(name, name)
    return name if name in ACTIVATIONS else "gelu"
