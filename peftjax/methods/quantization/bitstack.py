"""BitStack: the base as blocks of one bit a weight, of which as many are kept as memory allows.

Paper: Wang et al., "BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments",
ICLR 2025, arXiv 2410.23918.

    R_0 = W,   S_i = sign(R_i),   a_iᵀb_i = |R_i| to rank r,   R_i+1 = R_i - S_i ∘ (a_iᵀb_i)
    W ≈ Σ_i S_i ∘ (a_iᵀb_i)       S of 1 bit [in, out], a [r, in] and b [r, out] float16

A block takes 1 + 16 r (in + out) / (in · out) bits a weight. It trains nothing and goes before a method, as
`nf4`; a layer adds its blocks up for its product, forward and backward, and keeps them alone. The blocks of
all matrices have one order, first one of each, then the second ones, ..., of which `within_budget` keeps as
many as a number of bytes allows. Defaults are 16 blocks of rank 16, as in the released code.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from peftjax.core import tree
from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.core.linalg import balanced, randomized_svd, svd_of
from peftjax.core.targets import Targets, pattern_value, require_patterns_used, select
from peftjax.methods.quantization._base import BaseOptions
from peftjax.quantize.packing import pack
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_canonical
from peftjax.weights.layout import layout_of
from peftjax.weights.sharding import whole
from peftjax.weights.sign_blocks import SignBlocks, signed_product

NAME = "bitstack"
Block = tuple[str, int]
"""A block more of a matrix: the weight's path and the matrix's number in its stack."""


@dataclass(frozen=True, kw_only=True)
class BitstackOptions(BaseOptions):
    """Options of `bitstack`.

    Attributes:
        blocks: of each matrix at most.
        rank: r, of the sizes of a block.
        iterations: of a randomized singular value decomposition, much faster for large matrices; None takes
            the exact one.
    """

    blocks: int = 16
    rank: int = 16
    iterations: int | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        for name in ("blocks", "rank", "iterations"):
            positive(caller, name, getattr(self, name))


@register(
    kind="rewrite",
    paper="BitStack, Wang et al. 2025, arXiv 2410.23918",
    trains="nothing",
    backward_keeps="the blocks, 1 + 16 r (in + out) / (in · out) bits a weight for each",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"blocks": 2, "rank": 2}, starts_as_base=False),
)
@takes(BitstackOptions)
def bitstack(options: BitstackOptions) -> Transform:
    """Keep the targeted weights as sums of blocks of one bit (arXiv 2410.23918).

    A target that `decompose` has made blocks of stays as it is, with those that `within_budget` has left.

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters or
            a rank larger than a matrix.

    Examples:
        >>> params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}}
        >>> method = pj.chain(pj.bitstack(blocks=3, rank=1), pj.lora(rank=2))
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> frozen.params["up"]["kernel"].signs.shape
        (3, 64, 1)
    """

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        made = decompose(
            params, blocks=options.blocks, rank=options.rank, targets=options.targets,
            exclude=options.exclude, layouts=options.layouts, iterations=options.iterations,
        )  # fmt: skip
        return Frozen(made), {}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        return frozen.params

    return Transform(NAME, {}, init, apply)


def decompose(
    params: Params,
    *,
    blocks: int = 16,
    rank: int = 16,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    layouts: Mapping[str, str] | None = None,
    iterations: int | None = None,
    input_norms: Mapping[str, Array] | None = None,
) -> Params:
    """The parameters with blocks for the targeted ones.

    Args:
        params: the parameters.
        blocks: of each matrix.
        rank: r.
        targets: as in `lora`.
        exclude: as in `lora`.
        layouts: as in `lora`.
        iterations: as in `bitstack`.
        input_norms: by path, of each input `[*stack, in]`, its norm over a few batches: the error is then
            weighted by it, and a holds what undoes that.

    Raises:
        PeftError: as `bitstack`; norms of another shape.
    """
    leaves = tree.named_leaves(params)
    paths = select(params, targets, caller=NAME, exclude=exclude)
    require_patterns_used(NAME, layouts, paths)
    require_patterns_used(NAME, input_norms, paths)
    made = {}
    for path in paths:
        leaf = leaves[path]
        if isinstance(leaf, SignBlocks):
            continue
        if isinstance(leaf, Weight):
            raise PeftError(
                f"{NAME}: {path!r} is a {type(leaf).__name__} of an earlier method; blocks are made of plain "
                f"arrays, so put {NAME} first"
            )
        layout = layout_of(path, leaves, layouts)
        if rank > min(layout.matrix):
            raise PeftError(
                f"{NAME}: rank {rank} is larger than {path!r}, a matrix of {layout.matrix[0]} x "
                f"{layout.matrix[1]}; lower rank, or exclude it"
            )
        matrices = to_canonical(whole(leaf), layout)
        norms = jnp.ones(matrices.shape[:-1]) if input_norms is None else _norms(path, input_norms, matrices)
        signs, a, b = _decomposed(
            matrices.reshape(-1, *layout.matrix),
            norms.reshape(-1, layout.matrix[0]),
            blocks,
            rank,
            iterations,
        )
        parts = (part.reshape(*layout.stack, *part.shape[1:]) for part in (signs, a, b))
        made[path] = SignBlocks(*parts, layout, leaf.dtype)
    return tree.replace(params, made)


def within_budget(params: Params, budget: int, order: Sequence[Block] | None = None) -> Params:
    """The parameters with the first blocks of an order that a number of bytes allows.

    A larger budget keeps what a smaller one does. The layers of a stack have as many blocks as the one that
    has most, with zeros where they have fewer: these are not counted, and take memory.

    Args:
        params: with the weights that `decompose` has made.
        budget: bytes of all blocks.
        order: from `block_order`, which is by default asked without a loss.

    Raises:
        PeftError: one block of each matrix takes more.
    """
    weights, counts = _weights(params), _counts(params, 1)
    size = {path: _block_bytes(w) for path, w in weights.items()}
    left = budget - sum(size[path] * len(own) for path, own in counts.items())
    if left < 0:
        raise PeftError(
            f"{NAME}: one block of each matrix takes {budget - left:,} bytes, and the budget is {budget:,}; "
            "raise it, or target fewer weights"
        )
    for path, matrix in block_order(params) if order is None else order:
        left -= size[path]
        if left < 0:
            break
        counts[path][matrix] += 1
    kept = {}
    for path, w in _with_counts(params, counts).items():
        at = (*(slice(None),) * len(w.layout.stack), slice(max(counts[path])))
        kept[path] = replace(w, signs=w.signs[at], a=w.a[at], b=w.b[at])
    return tree.replace(params, kept)


def block_order(params: Params, loss: Callable[[Params], Any] | None = None) -> list[Block]:
    """In which order matrices are given one block more, once each has one.

    Level by level: at level l all matrices have l blocks, and each is tried with one more.

    Args:
        params: with the weights that `decompose` has made.
        loss: `params -> scalar`, such as the perplexity of a few batches, asked once for each matrix and
            level; where it is lower, the matrix comes earlier. By default those come earlier whose block
            takes more of the squared error away, which follows from its factors.
    """
    weights, order = _weights(params), []
    taken = {path: _squares(w) for path, w in weights.items()}
    for level in range(1, max(w.blocks for w in weights.values())):
        scores = {}
        for path, w in weights.items():
            for matrix in range(math.prod(w.layout.stack) if level < w.blocks else 0):
                if loss is None:
                    scores[path, matrix] = -float(taken[path][matrix, level])
                    continue
                counts = _counts(params, level)
                counts[path][matrix] += 1
                tried = tree.replace(params, _with_counts(params, counts))
                scores[path, matrix] = float(loss(tried))
        order += sorted(scores, key=lambda block: (scores[block], block))
    return order


def _weights(params: Params) -> dict[str, SignBlocks]:
    found = {path: w for path, w in tree.named_leaves(params).items() if isinstance(w, SignBlocks)}
    if not found:
        raise PeftError(f"{NAME}: no weight has blocks; make them by decompose(params, ...)")
    return found


def _counts(params: Params, count: int) -> dict[str, list[int]]:
    """So many blocks for each matrix."""
    return {path: [min(count, w.blocks)] * math.prod(w.layout.stack) for path, w in _weights(params).items()}


def _with_counts(params: Params, counts: Mapping[str, Sequence[int]]) -> dict[str, SignBlocks]:
    """The weights with zeros for the blocks beyond each matrix's count."""
    kept = {}
    for path, w in _weights(params).items():
        own = np.arange(w.blocks) < np.reshape(counts[path], (*w.layout.stack, 1))
        kept[path] = replace(w, b=jnp.where(jnp.asarray(own)[..., None, None], w.b, 0))
    return kept


def _block_bytes(w: SignBlocks) -> int:
    """Of one block of one matrix."""
    n, m = w.layout.matrix
    return n * -(-m // 8) + 2 * w.a.shape[-2] * (n + m)


def _squares(w: SignBlocks) -> np.ndarray:
    """`[matrices, blocks]`, the squared norm of each block, which it takes off the squared error."""
    a, b = (jnp.sum(part.astype(jnp.float32) ** 2, -1) for part in (w.a, w.b))
    return np.asarray(jnp.sum(a * b, -1)).reshape(-1, w.blocks)


def _norms(path: str, input_norms: Mapping[str, Array], matrices: Array) -> Array:
    norms = pattern_value(path, input_norms, None)
    if norms is None:
        return jnp.ones(matrices.shape[:-1])
    if norms.shape != matrices.shape[:-1]:
        raise PeftError(
            f"{NAME}: the input norms of {path!r} have shape {norms.shape}, and its inputs are "
            f"{matrices.shape[:-1]}"
        )
    return norms.astype(jnp.float32) + 1e-3


@partial(jax.jit, static_argnums=(2, 3, 4))
def _decomposed(
    matrices: Array, norms: Array, blocks: int, rank: int, iterations: int | None
) -> tuple[Array, Array, Array]:
    """Signs, a and b of each matrix, one after the other."""

    def of_block(state: tuple[Array, Array], number: Array) -> tuple[Any, tuple[Array, Array, Array]]:
        rest, norm = state
        size = jnp.abs(rest)
        if iterations is None:
            svd = svd_of(size)
        else:
            svd = randomized_svd(jax.random.key(number), size, rank, iterations)
        a, b = balanced(svd, rank)
        a, b = (a / norm).astype(jnp.float16), b.astype(jnp.float16)
        signs = pack((rest >= 0).astype(jnp.uint8), 1)
        # Of the rounded factors, so that the next block makes their error good too.
        return (rest - signed_product(signs, a * norm, b), norm), (signs, a, b)

    def of_matrix(given: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        w, norm = given
        start = w.astype(jnp.float32) * norm[:, None], norm
        return lax.scan(of_block, start, jnp.arange(blocks))[1]

    return lax.map(of_matrix, (matrices, norms))
