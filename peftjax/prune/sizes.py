"""The backbone whose blocks have the sizes that are left after a cut."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from peftjax.backbone.backbone import Backbone
from peftjax.core.errors import PeftError
from peftjax.models.sizes import Sizes, resized, sizes_of
from peftjax.prune.blocks import CROSS, ENCODER

Numbers = Mapping[str, Int[np.ndarray, "*stack k"]]


def with_sizes(model: Backbone, numbers: Numbers) -> Backbone:
    """The backbone of the units that are left, by the names of `block_groups`.

    Raises:
        PeftError: self- and cross-attention keep another number of heads; fewer experts are left than a token
            has.
    """
    own = _left(model, numbers, "")
    encoder = None if model.encoder is None else _left(model.encoder, numbers, ENCODER)
    return resized(model, own, encoder)


def _left(model: Backbone, numbers: Numbers, prefix: str) -> Sizes:
    config, sizes = model.block.config, sizes_of(model)
    queries = config.num_heads // config.kv_heads

    def count(name: str, before: int) -> int:
        own = numbers.get(f"{prefix}{name}")
        return before if own is None else own.shape[-1]

    heads = count("heads", config.kv_heads)
    if config.cross_attention and (cross := count(f"{CROSS}heads", config.kv_heads)) != heads:
        raise PeftError(
            f"sliced: {heads} heads of self-attention are kept and {cross} of cross-attention, which have "
            f"one number in a block; keep as many of 'heads' as of '{CROSS}heads'"
        )
    experts = None
    if config.experts is not None:
        experts = count("experts", config.experts.count)
        if experts < config.experts.chosen:
            raise PeftError(
                f"sliced: {experts} experts are kept, and each token has {config.experts.chosen}; keep as "
                "many at least"
            )
    layers = numbers.get(f"{prefix}layers")
    return replace(
        sizes,
        layers=sizes.layers if layers is None else tuple(int(number) for number in layers),
        num_heads=heads * queries,
        num_kv_heads=heads,
        inner_size=count("neurons", config.inner_size),
        experts=experts,
    )
