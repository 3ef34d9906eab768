"""Adapters of 1, 2 or 4 bits: any adapter, trained so that its matrices can be stored as codes.

Paper: Jie et al., "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision
Redundancy", ICCV 2023, arXiv 2307.16867 (Bi-LoRA, Bi-AdaptFormer).

    ŵ = c_k σ + μ,    k = nearest((w - μ) / (σ + 1e-5))       1 bit: c = ±0.674, 2 bits: ±0.378, ±1.266

Trained: w, float32, with μ and σ the mean and the unbiased deviation of each matrix, of a stack each layer's.
The model sees ŵ; the gradient takes dk = 1 and is exact in μ and σ. Stored: the codes, μ and σ, n·b/8 + 8
bytes a matrix. Vectors (biases, magnitudes) stay floats. Backward keeps what the adapter does, and ŵ, as many
numbers as are trained: training takes no less memory, a task takes fewer bytes, or at as many bytes a wider
adapter. Matrices that the adapter starts from one number, such as LoRA's `b`, start N(0, 0.001²) around it,
cut at two deviations: with σ = 0 nothing could be learned.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.backbone.rewriting import BlockStack
from peftjax.core import tree
from peftjax.core.checks import one_of
from peftjax.core.errors import PeftError
from peftjax.methods._targets import key_for
from peftjax.methods.lowrank.lora import lora
from peftjax.quantize.codes import Codes, decode
from peftjax.quantize.normal_codes import encode_normal, round_normal
from peftjax.transform.around import Around, with_frozen
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.layout import Layout, guess_layout
from peftjax.weights.sharding import whole

NAME = "quantized_adapter"
START = 1e-3
"""The deviation of a matrix that the adapter starts from one number."""


@register(
    kind="adapter",
    paper="Bi-LoRA, Bi-AdaptFormer, Jie et al. 2023, arXiv 2307.16867",
    trains="what the adapter does; stored in 1, 2 or 4 bits",
    backward_keeps="what the adapter does, and its matrices rounded",
    conformance=Conformance(example={"method": lora(rank=2, alpha=4.0)}, starts_as_base=False),
)
def quantized_adapter(method: Transform, *, bits: Literal[1, 2, 4] = 1) -> Transform:
    """An adapter whose matrices the model sees rounded to `2^bits` values (arXiv 2307.16867).

    `merge` gives what the forward pass has seen, and `pj.adapters.save_adapter` writes the codes. What
    `pj.adapters.load_adapter` then gives as the trainable are these codes: the same outputs, and nothing that
    could be trained further; a run's checkpoints have the numbers that are trained.
    `pj.adapters.rounded` makes an ordinary adapter of it.

    Args:
        method: the adapter, `pj.lora(rank=32)` or `pj.adaptformer(size=32, bias=False)`, or a chain of them.
        bits: of a code.

    Raises:
        PeftError: here for other bits, or a method that changes itself or its base between steps; in `init`
            for one that trains no matrix.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((64, 8))}}
        >>> method = pj.quantized_adapter(pj.lora(rank=2))
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> method.stored(frozen, trainable)["up/kernel"]["a"].codes.nbytes
        16
    """
    one_of(NAME, "bits", bits, (1, 2, 4))
    if method.advances or method.placement is not None:
        raise PeftError(
            f"{NAME}: {method.name!r} changes itself or its base between steps, which rounding would undo; "
            "use a method such as pj.lora, pj.dora or pj.adaptformer"
        )

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        frozen, trainable = method.init(key, params)
        coded = _matrices(frozen.plan, trainable)
        if not coded:
            raise PeftError(
                f"{NAME}: {method.name!r} trains no matrix, and nothing would be coded; use it as it is"
            )
        stacks = {name: stack for name, stack, _ in coded}

        def start(name: str, leaf: Array) -> Array:
            return _started(key_for(key, name), leaf, stacks[name]) if name in stacks else leaf

        return replace(frozen, plan=(frozen.plan, coded)), tree.map_named(start, trainable)

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        return method.apply(of_adapter(frozen), seen(frozen, trainable, bits), key=key)

    def stored(frozen: Frozen, trainable: Trainable) -> Trainable:
        if _is_stored(trainable):
            return trainable
        coded = {name: (stack, dtype) for name, stack, dtype in frozen.plan[1]}

        def encode(name: str, leaf: Array) -> Any:
            if name not in coded:
                return leaf
            stack, dtype = coded[name]
            return encode_normal(whole(leaf), stack, bits, dtype=jnp.dtype(dtype))

        return tree.map_named(encode, trainable)

    around = method.around
    if around is not None:
        around = Around(*(with_frozen(tx, of_adapter) for tx in (around.gradients, around.updates)))
    return Transform(
        NAME,
        {},
        init,
        apply,
        method.model,
        around=around,
        cut=method.cut,
        checks=method.checks,
        parts=method.parts,
        stored=stored,
    )


def of_adapter(frozen: Frozen) -> Frozen:
    """What the adapter itself keeps fixed."""
    return replace(frozen, plan=frozen.plan[0])


def seen(frozen: Frozen, trainable: Trainable, bits: int) -> Trainable:
    """The trainable of the adapter itself, with each coded matrix as the model sees it."""
    if _is_stored(trainable):
        return jax.tree.map(decode, trainable, is_leaf=_is_codes)
    coded = {name: (stack, dtype) for name, stack, dtype in frozen.plan[1]}

    def rounded(name: str, leaf: Array) -> Array:
        if name not in coded:
            return leaf
        stack, dtype = coded[name]
        return round_normal(leaf, stack, bits).astype(dtype)

    return tree.map_named(rounded, trainable)


def _is_codes(node: Any) -> bool:
    return isinstance(node, Codes)


def _is_stored(trainable: Trainable) -> bool:
    return any(map(_is_codes, jax.tree.leaves(trainable, is_leaf=_is_codes)))


def _started(key: Array, leaf: Array, stack: int) -> Array:
    """Float32, with random numbers around a matrix that is one number."""
    leaf, axes = leaf.astype(jnp.float32), tuple(range(stack, leaf.ndim))
    drawn = START * jax.random.truncated_normal(key, -2.0, 2.0, leaf.shape)
    same = leaf.max(axes, keepdims=True) == leaf.min(axes, keepdims=True)
    return jnp.where(same, leaf + drawn, leaf)


def _matrices(plan: Any, trainable: Trainable) -> tuple[tuple[str, int, str], ...]:
    """The matrices that are trained: name, number of stack axes and dtype."""
    stacks, found = dict(_stack_axes(plan)), []
    for name, leaf in tree.named_leaves(trainable).items():
        if name.rsplit("/", 1)[-1] in ("bias", "scale") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        owners = [owner for owner in stacks if f"/{owner}/" in f"/{name}/"]
        if owners:
            stack = stacks[max(owners, key=len)]
        elif leaf.ndim > 1:
            stack = guess_layout(name, leaf.shape).count("s")
        else:
            continue
        if leaf.ndim - stack > 1 and leaf[(0,) * stack].size > 1:
            found.append((name, stack, str(leaf.dtype)))
    return tuple(found)


def _stack_axes(plan: Any) -> Iterator[tuple[str, int]]:
    """What a method's plan says of the axes: of a weight its stack, of a stack of blocks its layers."""
    if isinstance(plan, Layout):
        yield plan.name, len(plan.stack)
    elif isinstance(plan, BlockStack):
        yield plan.name, 1
    elif is_dataclass(plan):
        for one in fields(plan):
            yield from _stack_axes(getattr(plan, one.name))
    elif isinstance(plan, tuple | list):
        for part in plan:
            yield from _stack_axes(part)
