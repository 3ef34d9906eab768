"""Arrow: adapters of several tasks as one model that routes every token to those that are nearest to it.

Papers: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", ICML 2024,
arXiv 2405.11157; Bagherifard et al., "GenKnowSub", ACL 2025 (general knowledge taken off first).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from peftjax.adapters.arithmetic import Adapter, added_leaves, common_base
from peftjax.core import tree
from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.core.linalg import svd_of_product
from peftjax.transform.frozen import Params
from peftjax.weights.low_rank import LowRank
from peftjax.weights.routed import Routed


def arrow(
    adapters: Sequence[Adapter], *, top_k: int = 3, temperature: float = 1.0, general: Sequence[Adapter] = ()
) -> Params:
    """The parameters with several adapters of one base, to which each layer routes every token.

        p_e = the input direction that a_eᵀb_e enlarges most       c = softmax(top_k |x·p_e| / temperature)
        y = x·W + Σ_e c_e s_e (x·a_eᵀ)·b_e

    Args:
        adapters: `(method, frozen, trainable)` each, low-rank ones on the same weights of the same base.
        top_k: how many a token takes.
        temperature: of their shares.
        general: adapters of general knowledge, such as of texts in some languages, of the same rank; the mean
            of their factors is taken off the factors of every adapter first (GenKnowSub).

    Raises:
        PeftError: as `add`; `top_k` is larger than the number of adapters, a weight is not adapted by all,
            or, with `general`, ranks differ.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.lora(rank=2, targets=["up"])
        >>> adapters = []
        >>> for seed in range(3):
        ...     frozen, trainable = method.init(jax.random.key(seed), params)
        ...     adapters.append((method, frozen, jax.tree.map(lambda x: x + 0.1, trainable)))
        >>> forward = pj.adapt(lambda params, x: x @ params["up"]["kernel"])
        >>> forward(pj.adapters.arrow(adapters, top_k=2), jnp.ones((3, 4))).shape
        (3, 8)
    """
    positive("arrow", "top_k", top_k)
    positive("arrow", "temperature", temperature)
    if top_k > len(adapters):
        raise PeftError(f"arrow: top_k is {top_k}, and there are {len(adapters)} adapters")
    leaves = [added_leaves(*adapter, (LowRank,)) for adapter in (*adapters, *general)]
    params = common_base([*adapters, *general])
    routed = {}
    for path in dict.fromkeys(path for own in leaves for path in own):
        if any(path not in own for own in leaves):
            raise PeftError(
                f"arrow: {path!r} is adapted by some of the adapters only; give those of the same weights"
            )
        tasks, others = (
            [own[path] for own in part] for part in (leaves[: len(adapters)], leaves[len(adapters) :])
        )
        routed[path] = _routed(path, tasks, others, top_k, temperature)
    return tree.replace(params, routed)


def _routed(
    path: str, tasks: Sequence[LowRank], general: Sequence[LowRank], top_k: int, temperature: float
) -> Routed:
    first, rank = tasks[0], max(leaf.a.shape[-2] for leaf in tasks)
    if general and any(leaf.a.shape != first.a.shape for leaf in (*tasks, *general)):
        ranks = sorted({leaf.a.shape[-2] for leaf in (*tasks, *general)})
        raise PeftError(
            f"arrow: the adapters of {path!r} have ranks {ranks}; general knowledge is taken off factors of "
            "one rank"
        )
    factors = [(leaf.a, leaf.b) for leaf in tasks]
    if general:
        mean_a, mean_b = (sum(getattr(leaf, name) for leaf in general) / len(general) for name in ("a", "b"))
        factors = [(a - mean_a, b - mean_b) for a, b in factors]
    axis = len(first.layout.stack)
    return Routed(
        first.base,
        jnp.stack([_padded(a, rank) for a, _ in factors], axis),
        jnp.stack([_padded(leaf.scale * b, rank) for leaf, (_, b) in zip(tasks, factors)], axis),
        jnp.stack([svd_of_product(a, b).u[..., 0].astype(jnp.float32) for a, b in factors], axis),
        first.layout,
        top_k,
        temperature,
    )


def _padded(factor: Array, rank: int) -> Array:
    missing = [(0, 0)] * (factor.ndim - 2) + [(0, rank - factor.shape[-2]), (0, 0)]
    return jnp.pad(factor, missing)
