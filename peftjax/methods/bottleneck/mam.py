"""Mix-and-match adapters: a prefix in every attention and a scaled parallel adapter at every feed-forward.

He et al. 2022, arXiv 2110.04366.

    attention     softmax(q [K_p; K]ᵀ / √H) [V_p; V]        P = 30, by an MLP of 512
    feed-forward  h + s (relu(x W_down + b) W_up + b')      r = 512, s = 4

Both parts are those of `prefix` and `parallel_adapter`, which say what is trained and what backward keeps.
The paper's reading is that a prefix of few tokens is a cheap adapter of the heads and that a large budget is
best spent at the feed-forward. A prefix of length 0 leaves the parallel adapter, a bottleneck of size 0 the
prefix. The released code draws a prefix for attention, cross-attention and the encoder, as here.
"""

from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.methods._parts import Layers, Part, of_parts
from peftjax.methods.bottleneck._bottleneck import Adapters, Bottleneck, Init
from peftjax.methods.prompt.prefix import Prefix, keys_and_values
from peftjax.transform.frozen import Trainable
from peftjax.transform.registry import Conformance, build, describe, register
from peftjax.transform.transform import Transform


@register(
    kind="adapter",
    paper="MAM adapters, He et al. 2022, arXiv 2110.04366",
    trains="a prefix and 2 D r + D + r a layer",
    backward_keeps="r values a token, and x in a post-norm block",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"length": 2, "mlp_size": 4, "size": 3}, starts_as_base=False),
)
def mam(
    *,
    length: int = 30,
    mlp_size: int | None = 512,
    size: int = 512,
    scale: float = 4.0,
    activation: str = "relu",
    init: Init = "lora",
    init_std: float = 0.02,
    prefix_dropout: float = 0.0,
    dropout: float = 0.0,
    layers: Layers = None,
) -> Transform:
    """A prefix in every attention and a parallel adapter at every feed-forward (arXiv 2110.04366).

    Args:
        length: P, of the prefix; 0 is none.
        mlp_size: m, of the prefix; None trains its keys and values as they are.
        size: r, of the adapter; 0 is none.
        scale: s, of the adapter.
        activation: f, of the adapter; as of `houlsby`.
        init: of the adapter; as of `houlsby`.
        init_std: of the prefix without an MLP.
        prefix_dropout: rate on the keys and values of the prefix.
        dropout: rate after the activation of the adapter.
        layers: numbers of the layers to adapt; None is all.

    Raises:
        PeftError: for a setting out of range, or no part left; in `init` and `model`, when it is not a
            backbone's.
    """
    parts: list[Part] = []
    if size:
        parts.append(Adapters(feed_forward=Bottleneck(size, "parallel", scale, activation, dropout, init)))
    if length:
        parts.append(Prefix(length, mlp_size, init_std, prefix_dropout))
    if not parts:
        raise PeftError("mam: length and size are both 0; give one of the two parts some room")
    return of_parts("mam", parts, layers)


def without_mlp(method: Transform, trainable: Trainable) -> tuple[Transform, Trainable]:
    """The same `prefix` or `mam` without its MLP: keys and values themselves are the trainable.

    `method.init` on the same base gives the frozen part. The outputs are the same and the file is smaller.

    Raises:
        PeftError: the method has no prefix.
    """
    if "mlp_size" not in method.config:
        raise PeftError(f"without_mlp: {method.name} has no MLP; give prefix or mam")

    def plain(parts: Mapping[str, Any]) -> dict[str, Any]:
        own = {branch: keys_and_values(values) for branch, values in parts.get("prefix", {}).items()}
        return {**parts, **({"prefix": own} if own else {})}

    again = build({**describe(method), "mlp_size": None})
    return again, {stack: plain(parts) for stack, parts in trainable.items()}
