"""PEQA: train the scales of a quantized base, and nothing else.

Paper: Kim et al., "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer
Quantization", NeurIPS 2023, arXiv 2305.14152.

    W = (s + Δs) ∘ (Q - z)       Q whole numbers [in, out], s and z a scale and a zero point for each output

    y = (s + Δs) ∘ u,  u = x·(Q - z)         dΔs = Σ dy ∘ u,   dx = (dy ∘ (s + Δs))·(Q - z)ᵀ

Trained: Δs, float32, from 0: out numbers a weight, or out · groups. Q, z and s never change, so that a task
is its scales and all tasks share the codes. With one scale for an output, backward keeps u, out numbers a
token, and not x. With groups of inputs it needs x, and holds the gradient of one weight at a time. Scales are
small, about 1/7 of the largest weight at 4 bits: so are good learning rates (1e-5 ... 5e-5 with Adam). Weight
decay acts on Δs, and so pulls towards the base.
"""

import math
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods.quantization._base import quantized_params
from peftjax.methods.quantization.quantized import FormatOptions
from peftjax.quantize.codes import decode
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.diagonal import Diagonal
from peftjax.weights.group_scaled import GroupScaled
from peftjax.weights.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class PeqaOptions(FormatOptions):
    """Those of `quantized`, with other defaults.

    Attributes:
        group: how many weights along the inputs share a scale; by default, -1, all inputs of an output.
        affine: whether a group has a zero point, as by default; formats other than whole numbers need False.
    """

    group: int | None = -1
    affine: bool = True


@register(
    kind="adapter",
    paper="PEQA, Kim et al. 2023, arXiv 2305.14152",
    trains="out, or out · groups",
    backward_keeps="x·(Q - z), out numbers a token; with groups x",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"format": "int2"}, starts_as_base=False),
)
@takes(PeqaOptions)
def peqa(options: PeqaOptions) -> Transform:
    """Quantize the targeted weights and train their scales (arXiv 2305.14152).

    A target that is codes already keeps them: `pj.chain(pj.quantized(...), pj.peqa())` trains their scales.

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((64, 8))}}
        >>> frozen, trainable = pj.peqa(format="int4").init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, trainable)
        {'up/kernel': {'change': (1, 8)}}
    """
    form = replace(options.form, runs_on=False)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        coded, paths = quantized_params("peqa", form, options, params, take_codes=True)
        leaves, trainable = tree.named_leaves(coded), {}
        for path in paths:
            *stack, rows, groups = leaves[path].codes.scales.shape
            if rows != leaves[path].layout.matrix["io".index(leaves[path].rows)]:
                raise PeftError(
                    f"peqa: the groups of {path!r}, a Quantized of an earlier method, run on from row to "
                    "row, so that no scale is of one output; code it in groups that divide its inputs"
                )
            if leaves[path].codes.format.scales_a_group > 1:
                raise PeftError(
                    f"peqa: a group of {path!r} has several scales, as sums of binaries have; train those of "
                    "a format with one, such as int3"
                )
            trainable[path] = {"change": jnp.zeros((*stack, groups, rows), jnp.float32)}
        return Frozen(coded), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        leaves = tree.named_leaves(frozen.params)
        scaled = {path: _rescaled(leaves[path], slots["change"]) for path, slots in trainable.items()}
        return tree.replace(frozen.params, scaled)

    return Transform("peqa", {}, init, apply)


def _rescaled(w: Quantized, change: Array) -> Weight:
    """The weight with its scales changed by `change [*stack, groups, rows]`."""
    side = "by_output" if w.rows == "o" else "by_input"
    if change.shape[-2] > 1:
        return GroupScaled(w, w.layout, **{side: change})
    # Units up to 1, so that u does not leave the range of 16-bit floats; a power of two loses nothing.
    unit = 2.0 ** -math.frexp(w.codes.format.element.greatest)[1]
    scales = decode(w.codes.scales).astype(jnp.float32)
    units = replace(w, codes=replace(w.codes, scales=jnp.full_like(scales, unit)))
    return Diagonal(units, w.layout, **{side: (scales[..., 0] + change[..., 0, :]) / unit})
