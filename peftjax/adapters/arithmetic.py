"""Several adapters on one base: switched, summed, combined into one, mixed per row of a batch.

An adapter is a trainable; switching is passing another one to `apply`. The base is never touched, so
going back is exact. Sums and combinations are exact too: the factors are put side by side,

    Σ_i w_i s_i a_iᵀ b_i  =  [a_1; a_2; ...]ᵀ [w_1 s_1 b_1; w_2 s_2 b_2; ...]

and a smaller rank is the best one, from the singular values of that product (found from the factors). A
larger rank adds directions in which the product is zero and which can learn (`grow`).
Rows that are trained (PaCA) are such a product too; trained entries (SHiRA, SaRA) can be summed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.adapters.growing import adapted, default_key, grown, revived
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.linalg import balanced, svd_of_product
from peftjax.methods._targets import Target
from peftjax.methods.lowrank.dora import dora
from peftjax.methods.lowrank.lora import lora
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight, dense
from peftjax.weights.batched_low_rank import BatchedLowRank
from peftjax.weights.column_normalized import ColumnNormalized
from peftjax.weights.derived import Derived
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank
from peftjax.weights.rows import TrainedRows
from peftjax.weights.sparse_entries import SparseEntries

Adapter = tuple[Transform, Frozen, Trainable]


def add(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Params:
    """The parameters with several adapters of one base active at once: `base + Σ w_i Δ_i`.

    Args:
        adapters: `(method, frozen, trainable)` each, on the same base parameters.
        weights: one factor each, negative ones too; all 1 by default.

    Raises:
        PeftError: the adapters have different bases, or one is not a sum with its base (DoRA), or
            several train the same plain parameter.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.lora(rank=2, targets=["up"])
        >>> frozen, first = method.init(jax.random.key(0), params)
        >>> _, second = method.init(jax.random.key(1), params)
        >>> adapters = [(method, frozen, first), (method, frozen, second)]
        >>> forward = pj.adapt(lambda params, x: x @ params["up"]["kernel"])
        >>> forward(pj.adapters.add(adapters, [0.7, 0.3]), jnp.ones((3, 4))).shape
        (3, 8)
    """
    weights = _weights(adapters, weights)
    leaves = [added_leaves(*adapter, (LowRank, SparseEntries)) for adapter in adapters]
    params = common_base(adapters)
    for path in dict.fromkeys(path for own in leaves for path in own):
        active = [(own[path], w) for own, w in zip(leaves, weights) if path in own]
        params = tree.replace(params, {path: _sum_of(active)})
    return params


def mix(adapters: Sequence[Adapter], rows: Array, *, axis: int | None = None) -> Params:
    """The parameters with adapter `rows[b]` active for row b of the batch, and none where it is -1.

    Args:
        adapters: `(method, frozen, trainable)` each, on the same base parameters.
        rows: int32 `[B]`, traced or not; out-of-range numbers take the nearest adapter.
        axis: of the activations (and ids) on which the batch lies: 0, or 1 with the sequence first. None
            finds it in each layer as the one axis of B members, and is an error where several have as many
            or batch and tokens are flattened into one.

    Raises:
        PeftError: as `add`.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.lora(rank=2, targets=["up"])
        >>> frozen, first = method.init(jax.random.key(0), params)
        >>> _, second = method.init(jax.random.key(1), params)
        >>> adapters = [(method, frozen, first), (method, frozen, second)]
        >>> forward = pj.adapt(lambda params, x: x @ params["up"]["kernel"])
        >>> forward(pj.adapters.mix(adapters, jnp.array([0, 1, -1])), jnp.ones((3, 4))).shape
        (3, 8)
    """
    leaves = [added_leaves(*adapter, (LowRank,)) for adapter in adapters]
    params = common_base(adapters)
    rows = jnp.asarray(rows, jnp.int32)
    for path in dict.fromkeys(path for own in leaves for path in own):
        first = next(own[path] for own in leaves if path in own)
        stack = first.layout.stack
        rank = max(own[path].a.shape[-2] for own in leaves if path in own)
        factors = [_padded(own.get(path), first, rank) for own in leaves]
        a = jnp.stack([a for a, _ in factors], axis=len(stack))
        b = jnp.stack([b for _, b in factors], axis=len(stack))
        own_rows = jnp.broadcast_to(rows, (*stack, *rows.shape))
        params = tree.replace(params, {path: BatchedLowRank(first.base, a, b, own_rows, first.layout, axis)})
    return params


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    key: Array | None = None,
) -> tuple[Transform, Trainable]:
    """One LoRA adapter equal to the weighted sum of several, or to one: `(method, trainable)`.

    Args:
        adapters: `(method, frozen, trainable)` each, on the same base parameters.
        weights: one factor each; all 1 by default.
        rank: None keeps the sum exact (the ranks add up, to at most that of the matrix). A smaller number
            than that of the sum keeps the best approximation of that rank, singular values being `√σ` on both
            factors. A larger one (of each weight, to at most that of its matrix) is exact too: the factors
            stay, and directions are added that start as those of a fresh LoRA do. This is how the rank grows
            in the middle of training, that of a single DoRA too.
        key: of the directions that start afresh; without one `jax.random.key(0)`, so that they are the same
            whenever it is called.

    Returns:
        A `lora` transform (`dora` for one of it) with scale 1 on exactly the adapted weights, and its
        trainable. Each direction of it can learn: one whose product is zero has one random factor.

    Raises:
        PeftError: as `add`; or when the rank is not positive.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.lora(rank=2, targets=["up"])
        >>> frozen, first = method.init(jax.random.key(0), params)
        >>> _, second = method.init(jax.random.key(1), params)
        >>> adapters = [(method, frozen, first), (method, frozen, second)]
        >>> both, trainable = pj.adapters.combine(adapters)
        >>> both.name, trainable["up/kernel"]["a"].shape
        ('lora', (4, 4))
    """
    if rank is not None and rank < 1:
        raise PeftError(f"combine: rank must be positive, got {rank}")
    key = default_key() if key is None else key
    scaled = {} if rank is None else _one_dora(adapters, weights, rank)
    if scaled:
        leaves = {path: _sum_of([(leaf.base, 1.0)]) for path, leaf in scaled.items()}
    else:
        for adapter in adapters:
            added_leaves(*adapter, (LowRank,))
        params = tree.named_leaves(add(adapters, weights))
        leaves = {path: leaf for path, leaf in params.items() if isinstance(leaf, LowRank)}
    factors = {}
    for path, leaf in leaves.items():
        own, full = leaf.a.shape[-2], min(leaf.layout.matrix)  # a product has no higher rank than `full`
        wanted = min(own if rank is None else rank, full)
        if wanted > own:
            factors[path] = grown(leaf.a, leaf.b, wanted, key, leaf.layout)
        elif rank is None and own <= full:
            factors[path] = (leaf.a, leaf.b)
        else:
            factors[path] = _truncated(leaf.a, leaf.b, wanted, key, leaf.layout)
    layouts = {path: leaf.layout for path, leaf in leaves.items()}
    return as_lora(factors, layouts, {path: leaf.magnitude for path, leaf in scaled.items()})


def alike(adapters: Sequence[Adapter], *, rank: int | None = None) -> tuple[Transform, list[Trainable]]:
    """One LoRA method, and a trainable of it equal to each adapter: a compiled program takes any of them.

    Factors are padded with zeros to one rank, scales go into `b`, and a weight that an adapter leaves alone
    has zeros. The padding has no gradient; train with the adapter's own method.

    Args:
        adapters: `(method, frozen, trainable)` each, on the same base parameters.
        rank: of every weight, to leave room for adapters that come later; by default the largest of each
            weight.

    Returns:
        A `lora` with scale 1 on the weights of all, and the trainables in order.

    Raises:
        PeftError: as `add`; or an adapter's rank is larger than `rank`.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> adapters = []
        >>> for rank in (1, 3):
        ...     method = pj.lora(rank=rank, targets=["up"])
        ...     adapters.append((method, *method.init(jax.random.key(rank), params)))
        >>> method, trainables = pj.adapters.alike(adapters)
        >>> [one["up/kernel"]["a"].shape for one in trainables]
        [(3, 4), (3, 4)]
    """
    leaves = [added_leaves(*adapter, (LowRank,)) for adapter in adapters]
    common_base(adapters)
    found: list[dict[str, tuple[Array, Array]]] = [{} for _ in leaves]
    layouts = {}
    for path in dict.fromkeys(path for own in leaves for path in own):
        first = next(own[path] for own in leaves if path in own)
        largest = max(own[path].a.shape[-2] for own in leaves if path in own)
        if rank is not None and largest > rank:
            raise PeftError(f"alike: {path!r} has an adapter of rank {largest}; give a rank of at least that")
        layouts[path] = first.layout
        for own, factors in zip(leaves, found):
            factors[path] = _padded(own.get(path), first, rank or largest)
    made = [as_lora(factors, layouts) for factors in found]
    return made[0][0], [trainable for _, trainable in made]


def as_lora(
    factors: Mapping[str, tuple[Array, Array]],
    layouts: Mapping[str, Layout],
    magnitudes: Mapping[str, Array] | None = None,
) -> tuple[Transform, Trainable]:
    """A `lora` transform with scale 1 on exactly these weights, and its trainable.

    Args:
        factors: `a [*stack, r, in]` and `b [*stack, r, out]` by path; ranks may differ.
        layouts: of the same weights.
        magnitudes: `[*stack, out]` of the same weights, which make it `dora`.
    """
    ranks = {f"^{re.escape(path)}": a.shape[-2] for path, (a, _) in factors.items()}
    method = (dora if magnitudes else lora)(
        rank=max(ranks.values()),
        targets="|".join(re.escape(path) for path in factors),
        rank_pattern=ranks,
        alpha_pattern={name: float(r) for name, r in ranks.items()},
        layouts={f"^{re.escape(path)}": layouts[path].letters for path in factors},
    )
    trainable = {path: {"a": a, "b": b} for path, (a, b) in factors.items()}
    for path, magnitude in (magnitudes or {}).items():
        trainable[path]["magnitude"] = magnitude
    return method, trainable


def _one_dora(
    adapters: Sequence[Adapter], weights: Sequence[float] | None, rank: int
) -> dict[str, ColumnNormalized]:
    """The weights of a single DoRA on whole stacks, of at most this rank; empty for anything else."""
    if len(adapters) != 1 or list(weights or [1.0]) != [1.0]:
        return {}
    ((method, frozen, trainable),) = adapters
    bases = tree.named_leaves(frozen.params)
    leaves = tree.named_leaves(method.apply(replace(frozen, advanced=True), trainable))
    changed = {path: leaf for path, leaf in leaves.items() if leaf is not bases[path]}
    grows = all(
        isinstance(leaf, ColumnNormalized) and leaf.base.base is bases[path] and leaf.base.a.shape[-2] <= rank
        for path, leaf in changed.items()
    )
    whole = all(isinstance(target, Target) and target.layers is None for target in frozen.plan)
    return changed if grows and whole else {}


def _weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise PeftError(f"{len(adapters)} adapters were given with {len(weights)} weights")
    return weights


def common_base(adapters: Sequence[Adapter]) -> Params:
    """The base parameters, which every adapter must share."""
    if not adapters:
        raise PeftError("give at least one adapter")
    first = adapters[0][1].params
    leaves = tree.named_leaves(first)
    for method, frozen, _ in adapters[1:]:
        for path, leaf in tree.named_leaves(frozen.params).items():
            if leaf is not leaves.get(path):
                raise PeftError(
                    f"{method.name}: parameter {path!r} is not the same array in both bases; adapters "
                    "share a base when `init` got the same parameters and replaced none (as PiSSA does)"
                )
    return first


def added_leaves(
    method: Transform, frozen: Frozen, trainable: Trainable, kinds: tuple[type[Weight], ...]
) -> dict[str, Any]:
    """The adapted weights, each its base plus something of one of these kinds; rows as low-rank weights."""
    leaves = tree.named_leaves(method.apply(replace(frozen, advanced=True), trainable))
    bases = tree.named_leaves(frozen.params)
    for path in leaves:
        if isinstance(bases[path], tree.Hole):
            raise PeftError(
                f"{method.name}: {path!r} is trained as it is; two such adapters cannot be active "
                "together, so train only factors in adapters that are added or mixed"
            )
    changed = {path: leaf for path, leaf in leaves.items() if leaf is not bases[path]}
    for path, leaf in changed.items():
        if getattr(leaf, "in_place", False):
            raise PeftError(
                f"{method.name}: {path!r} holds its trained values; give what method.open(frozen, trainable) "
                "returns"
            )
        if isinstance(leaf, TrainedRows):
            changed[path] = leaf = leaf.as_low_rank()
        elif isinstance(leaf, Derived):
            changed[path] = leaf = leaf.formed()
        if not isinstance(leaf, kinds) or leaf.base is not bases[path]:
            raise PeftError(
                f"{method.name}: {path!r} is a {type(leaf).__name__}, not its base plus one low-rank "
                "product; such adapters are switched, not added or mixed"
            )
    return changed


def _sum_of(active: Sequence[tuple[Any, float]]) -> Weight:
    """One weight with all of these active: trained entries inside, low-rank products around them."""
    first = active[0][0]
    total = first.base
    for leaf, w in active:
        if isinstance(leaf, SparseEntries):
            values = w * leaf.changes(dense(leaf.base))
            total = SparseEntries(total, values, leaf.rows, leaf.columns, leaf.layout, added=True)
    thin = [(leaf, w) for leaf, w in active if isinstance(leaf, LowRank)]
    if thin:
        a, b = _side_by_side([leaf for leaf, _ in thin], [w for _, w in thin])
        total = LowRank(total, a, b, first.layout)
    return total


def _side_by_side(leaves: Sequence[LowRank], weights: Sequence[float]) -> tuple[Array, Array]:
    a = jnp.concatenate([leaf.a for leaf in leaves], axis=-2)
    b = jnp.concatenate([w * leaf.scale * leaf.b for leaf, w in zip(leaves, weights)], axis=-2)
    return a, b


def _padded(leaf: LowRank | None, like: LowRank, rank: int) -> tuple[Array, Array]:
    if leaf is None:
        leading = like.a.shape[:-2]
        return jnp.zeros((*leading, rank, like.a.shape[-1])), jnp.zeros((*leading, rank, like.b.shape[-1]))
    missing = [(0, 0)] * (leaf.a.ndim - 2) + [(0, rank - leaf.a.shape[-2]), (0, 0)]
    return jnp.pad(leaf.a, missing), jnp.pad(leaf.scale * leaf.b, missing)


def _truncated(a: Array, b: Array, rank: int, key: Array, layout: Layout) -> tuple[Array, Array]:
    """Factors of this rank closest to `aᵀb`, without forming it."""
    svd = svd_of_product(a, b)
    return revived(balanced(svd, rank), svd.sizes[..., :rank], adapted(a, b), key, layout)
