"""Bottleneck adapters: small trained layers inside the frozen blocks.

    houlsby           h + Δ(h) after attention and after the feed-forward     1902.00751
    pfeiffer          h + Δ(h) after the feed-forward only                    2005.00247
    parallel_adapter  h + s Δ(x) beside the feed-forward, attention or both   He et al. 2022, 2110.04366
    adaptformer       h + s Δ(x) beside the feed-forward, s = 0.1             Chen et al. 2022, 2205.13535

h [B, S, D] is what a branch adds to the stream, before the residual sum (in a post-norm block before its
norm too), x [B, S, D] the stream that the branch reads, before any norm; Δ is that of `Bottleneck`. Adapters
of attention are in cross-attention too, each with its own numbers.

Trained: 2 D r + D + r numbers an adapter. Backward keeps, per token and adapter, the r values before `f`,
for h + Δ(h) also h, and for h + s Δ(x) in a post-norm block also x.
"""

from typing import Literal

from peftjax.core.checks import one_of
from peftjax.methods._parts import Layers, of_parts
from peftjax.methods.bottleneck._bottleneck import Adapters, Bottleneck, Init, Norm
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform

Places = Literal["feed_forward", "attention", "both"]
PLACES = ("feed_forward", "attention", "both")


@register(
    kind="adapter",
    paper="adapters after both sublayers, Houlsby et al. 2019, arXiv 1902.00751",
    trains="2 (2 D r + D + r) a layer",
    backward_keeps="what both branches give and 2 r values a token",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"size": 3}, starts_as_base=False),
)
def houlsby(
    *,
    size: int = 64,
    activation: str = "gelu",
    init: Init = "houlsby",
    dropout: float = 0.0,
    layers: Layers = None,
) -> Transform:
    """`h + f(h W_down + b) W_up + b'` after every attention and every feed-forward (arXiv 1902.00751).

    Args:
        size: r, the width of the bottleneck.
        activation: f: "relu", "gelu", "gelu_new", "silu", "tanh" or "identity".
        init: "houlsby" (near the base), "bert", or "lora" (exactly the base); see `Bottleneck`.
        dropout: rate after the activation.
        layers: numbers of the layers to adapt; None is all.

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, when it is not a backbone's.
    """
    bottleneck = Bottleneck(size, activation=activation, dropout=dropout, init_as=init)
    return of_parts("houlsby", [Adapters(bottleneck, bottleneck)], layers)


@register(
    kind="adapter",
    paper="adapters after the feed-forward, Pfeiffer et al. 2021, arXiv 2005.00247",
    trains="2 D r + D + r a layer",
    backward_keeps="what the branch gives and r values a token",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"size": 2}),
)
def pfeiffer(
    *,
    size: int = 48,
    activation: str = "relu",
    scale: float = 1.0,
    init: Init = "lora",
    dropout: float = 0.0,
    layers: Layers = None,
) -> Transform:
    """`h + s (f(h W_down + b) W_up + b')` after every feed-forward (arXiv 2005.00247).

    Args:
        size: r, the width of the bottleneck.
        activation: f, as of `houlsby`.
        scale: s.
        init: as of `houlsby`.
        dropout: rate after the activation.
        layers: numbers of the layers to adapt; None is all.

    Raises:
        PeftError: as `houlsby`.
    """
    bottleneck = Bottleneck(size, "sequential", scale, activation, dropout, init)
    return of_parts("pfeiffer", [Adapters(feed_forward=bottleneck)], layers)


@register(
    kind="adapter",
    paper="scaled parallel adapters, He et al. 2022, arXiv 2110.04366",
    trains="2 D r + D + r a layer and place",
    backward_keeps="r values a token and place, and x in a post-norm block",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"size": 3, "places": "both", "norm": "in", "learn_scale": True}),
)
def parallel_adapter(
    *,
    size: int = 512,
    scale: float = 4.0,
    places: Places = "feed_forward",
    activation: str = "relu",
    init: Init = "lora",
    norm: Norm = "none",
    learn_scale: bool = False,
    dropout: float = 0.0,
    layers: Layers = None,
) -> Transform:
    """`h + s (f(x W_down + b) W_up + b')` beside the branches named (scaled PA, arXiv 2110.04366).

    Args:
        size: r, the width of the bottleneck; the paper's is 512 at the feed-forward, 200 at attention.
        scale: s.
        places: "feed_forward", "attention" or "both".
        activation: f, as of `houlsby`.
        init: as of `houlsby`.
        norm: a layer norm "in" front of the adapter, or on what it gives out ("out"), or "none".
        learn_scale: whether s is trained too, one a layer and place, from `scale`.
        dropout: rate after the activation.
        layers: numbers of the layers to adapt; None is all.

    Raises:
        PeftError: as `houlsby`.
    """
    one_of("parallel_adapter", "places", places, PLACES)
    bottleneck = Bottleneck(size, "parallel", scale, activation, dropout, init, norm, learn_scale)
    of = {place: bottleneck for place in PLACES[:2] if places in (place, "both")}
    return of_parts("parallel_adapter", [Adapters(**of)], layers)


@register(
    kind="adapter",
    paper="AdaptFormer, Chen et al. 2022, arXiv 2205.13535",
    trains="2 D r + D + r a layer",
    backward_keeps="r values a token, and x in a post-norm block",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"size": 3}),
)
def adaptformer(
    *,
    size: int = 64,
    scale: float = 0.1,
    norm: Norm = "none",
    learn_scale: bool = False,
    bias: bool = True,
    dropout: float = 0.1,
    layers: Layers = None,
) -> Transform:
    """`h + s (relu(x W_down + b) W_up + b')` beside every feed-forward (AdaptFormer, arXiv 2205.13535).

    Args:
        size: r, the width of the bottleneck.
        scale: s.
        norm: as of `parallel_adapter`.
        learn_scale: as of `parallel_adapter`.
        bias: whether W_down and W_up have biases.
        dropout: rate after the activation.
        layers: numbers of the layers to adapt; None is all.

    Raises:
        PeftError: as `houlsby`.
    """
    bottleneck = Bottleneck(size, "parallel", scale, "relu", dropout, "lora", norm, learn_scale, bias)
    return of_parts("adaptformer", [Adapters(feed_forward=bottleneck)], layers)
