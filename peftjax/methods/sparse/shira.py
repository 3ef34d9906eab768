"""SHiRA: train a small share of the entries of each weight, chosen once.

Paper: Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024, arXiv 2406.13175.

    W' = W + S,   S[i_k, o_k] = v_k       K entries, fixed; v [K] trained, zero at first
    y = x·W'      dv_k = (xᵀ·g)[i_k, o_k]       dx = g·W'ᵀ

Trained: K numbers a weight, float32. S is sparse and of high rank. Backward keeps each adapted layer's input
x, as full fine-tuning does (an entry may need any column): what is saved is the optimizer's state. Masks:
'random'; 'struct' (every f-th row and column, and the diagonal); 'magnitude' (largest |W|, the paper's WM);
'gradient' (largest |dL/dW|) and 'snip' (largest |W · dL/dW|), which take `gradients` from `mean_gradient`.
Defaults: K = `rank · (in + out)`, LoRA's of that rank, with the 32 of Hugging Face's PEFT; or give `density`,
0.01 to 0.02 in the paper.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import one_of, positive, positive_share
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, pattern_value, require_patterns_used
from peftjax.methods._entries import Entries, entry_count, largest_entries, random_entries, structured_entries
from peftjax.methods._targets import key_for
from peftjax.methods.sparse._added_entries import put_added, started, with_entries
from peftjax.methods.sparse._in_place import find_weights, in_the_base
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import dense
from peftjax.weights.canonical import to_canonical
from peftjax.weights.layout import Layout

Mask = Literal["random", "struct", "magnitude", "gradient", "snip", "loaded"]
_BY_GRADIENT = ("gradient", "snip")


@register(
    kind="adapter",
    paper="SHiRA, Bhardwaj et al. 2024, arXiv 2406.13175",
    trains="K of the entries",
    backward_keeps="the input x",
    conformance=Conformance(example={"rank": 2}),
)
def shira(
    *,
    rank: int = 32,
    density: float | None = None,
    mask: Mask = "random",
    gradients: Any = None,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    layouts: Mapping[str, str] | None = None,
    in_place: bool = False,
) -> Transform:
    """Sparse high-rank adapters on the targeted weights (arXiv 2406.13175).

    Args:
        rank: K is `rank · (in + out)` for each matrix; with 'struct', at most that.
        density: K as a share of the matrix, instead of `rank`.
        mask: how the entries are chosen; see above. A mask chosen by gradients is saved as 'loaded': the
            entries come from the saved adapter, and are drawn at random where there is none.
        gradients: for 'gradient' and 'snip', arrays of the targets' shapes, in a tree like the parameters
            or by path.
        targets: as in `lora`.
        exclude: what to leave out, in the same forms; wins over `targets`.
        rank_pattern: rank by pattern.
        layouts: axes by pattern.
        in_place: the base may hold the adapted weights; see `Transform.close`.

    Raises:
        PeftError: here for an option out of range; in `init` for targets, counts or gradients that do not
            fit the parameters.
    """
    _check(rank, density, mask, gradients)
    given = tree.named_leaves(gradients) if gradients is not None else {}
    config = {"mask": "loaded" if mask in _BY_GRADIENT else mask}

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        found = find_weights(
            params, caller="shira", targets=targets, exclude=exclude, layouts=layouts, in_place=in_place
        )
        require_patterns_used("shira", rank_pattern, list(found))
        leaves, chosen = tree.named_leaves(params), {}
        for path, layout in found.items():
            own = pattern_value(path, rank_pattern, rank)
            count = entry_count("shira", path, layout, own, density)
            entries = _entries(key_for(key, path), path, layout, count, mask, leaves[path], given)
            chosen[path] = (layout, entries)
        return started(params, chosen, in_place=in_place)

    placement = in_the_base(put_added) if in_place else None
    return Transform("shira", config, init, with_entries, placement=placement)


def _check(rank: int, density: float | None, mask: str, gradients: Any) -> None:
    positive("shira", "rank", rank)
    positive_share("shira", "density", density)
    one_of("shira", "mask", mask, get_args(Mask))
    if (mask in _BY_GRADIENT) != (gradients is not None):
        raise PeftError(
            f"shira: mask {mask!r} and gradients do not go together; gradients, from "
            "peftjax.mean_gradient, are for the masks 'gradient' and 'snip'"
        )


def _entries(
    key: Array, path: str, layout: Layout, count: int, mask: str, leaf: Any, gradients: Mapping[str, Array]
) -> Entries:
    if mask == "struct":
        return structured_entries("shira", path, layout, count)
    if mask in ("random", "loaded"):
        return random_entries(key, layout, count)
    scores = jnp.ones(()) if mask == "gradient" else dense(leaf).astype(jnp.float32)
    if mask in _BY_GRADIENT:
        if path not in gradients or gradients[path].shape != leaf.shape:
            raise PeftError(f"shira: gradients has no array of shape {leaf.shape} for {path!r}")
        scores = scores * gradients[path]
    return largest_entries(to_canonical(jnp.abs(scores), layout), layout, count)
