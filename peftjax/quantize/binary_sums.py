"""Groups of numbers as sums of binaries: signs, and a few scales for each group.

    w_i ≈ Σ_k α_k b_ki,    b in {-1, 1},  α_1 ≥ ... ≥ α_q ≥ 0            2^q values, which each group chooses

Greedy start: b_k = sign(r), α_k = mean|r|, r ← r - α_k b_k. Then in turn the least squares α for the signs at
hand, and for each number the nearest of the 2^q sums (Xu et al., ICLR 2018, arXiv 1802.00150; of weights in
ShiftAddLLM, NeurIPS 2024, arXiv 2406.05981). A code has a bit for each sign, that of α_1 the highest; 1 is +.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

_RIDGE = 1e-6
"""What is added to the diagonal of the normal equations, whose signs may be those of each other."""


@dataclass(frozen=True)
class BinarySum:
    """A sum of `bits` binaries, with as many scales for each group.

    Attributes:
        bits: q, at most 4.
        rounds: how often scales and signs are fitted in turn, after the greedy start.
    """

    bits: int
    rounds: int = 20

    @property
    def greatest(self) -> float:
        """1: scales are in the units of the numbers."""
        return 1.0


def fit_scales(
    groups: Float[Array, "*lead group"], valid: Float[Array, "... group"], element: BinarySum
) -> Float[Array, "*lead q"]:
    """The scales α of each group, whose squared error no round has made larger.

    Args:
        groups: the numbers, float32.
        valid: 1, or 0 where a group is filled up; broadcasts to `groups`.
        element: how many binaries, and rounds.
    """
    count = valid.sum(-1)

    def nearest_of(scales: Array) -> tuple[Array, Array]:
        codes, distance = _nearest(groups, scales)
        return codes, jnp.sum(valid * distance**2, -1)

    def refine(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, codes, least = state
        signs = [valid * _sign(codes, k, element.bits) for k in range(element.bits)]
        gram = [[jnp.sum(one * other, -1) / count for other in signs] for one in signs]
        wanted = [jnp.sum(one * groups, -1) / count for one in signs]
        scales = _descending(jnp.abs(jnp.stack(_solved(gram, wanted), -1)))
        new = (scales, *nearest_of(scales))
        better = new[-1] < least
        return tuple(
            jnp.where(better.reshape(*better.shape, *(1,) * (one.ndim - better.ndim)), one, old)
            for one, old in zip(new, state)
        )

    scales = _greedy(groups, valid, count, element.bits)
    return lax.fori_loop(0, element.rounds, refine, (scales, *nearest_of(scales)))[0]


def nearest(
    groups: Float[Array, "*lead group"], scales: Float[Array, "*lead q"]
) -> UInt8[Array, "*lead group"]:
    """The code of the sum nearest to each number; of equals the one whose code is larger, so + of 0."""
    return _nearest(groups, scales)[0]


def _nearest(groups: Array, scales: Array) -> tuple[Array, Array]:
    """The codes, and how far each number is from its sum."""
    bits = scales.shape[-1]
    totals = sums(jnp.arange(2**bits, dtype=jnp.uint8), [scales[..., k : k + 1] for k in range(bits)])
    codes = jnp.full(groups.shape, 2**bits - 1, jnp.uint8)
    least = jnp.abs(groups - totals[..., -1:])
    # Compared in turn: the distances to all sums at once would be 2^q arrays.
    for code in reversed(range(2**bits - 1)):
        distance = jnp.abs(groups - totals[..., code : code + 1])
        codes = jnp.where(distance < least, jnp.uint8(code), codes)
        least = jnp.minimum(distance, least)
    return codes, least


def sums(codes: UInt8[Array, "..."], scales: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
    """What codes stand for: the sum of the scales with their signs; each scale broadcasts to the codes."""
    bits = len(scales)
    return sum((_sign(codes, k, bits) * scale for k, scale in enumerate(scales)), jnp.zeros((), jnp.float32))


def _sign(codes: Array, k: int, bits: int) -> Array:
    return jnp.where((codes >> (bits - 1 - k)) & 1 == 1, 1.0, -1.0).astype(jnp.float32)


def _descending(scales: Array) -> Array:
    return -jnp.sort(-scales, axis=-1)


def _greedy(groups: Array, valid: Array, count: Array, bits: int) -> Array:
    rest, scales = groups, []
    for _ in range(bits):
        scale = jnp.sum(valid * jnp.abs(rest), -1) / count
        rest = rest - jnp.where(rest >= 0, 1.0, -1.0) * scale[..., None]
        scales.append(scale)
    return _descending(jnp.stack(scales, -1))


def _solved(gram: list[list[Array]], wanted: list[Array]) -> list[Array]:
    """The solutions of many small symmetric systems, by Cholesky's way, one in each place of the arrays."""
    size = len(wanted)
    lower = [[jnp.zeros(()) for _ in range(size)] for _ in range(size)]
    for row in range(size):
        for column in range(row + 1):
            rest = gram[row][column] - sum(lower[row][k] * lower[column][k] for k in range(column))
            if row == column:
                lower[row][row] = jnp.sqrt(jnp.maximum(rest + _RIDGE, _RIDGE))
            else:
                lower[row][column] = rest / lower[column][column]
    forward: list[Array] = []
    for row in range(size):
        rest = wanted[row] - sum(lower[row][k] * forward[k] for k in range(row))
        forward.append(rest / lower[row][row])
    found: dict[int, Array] = {}
    for row in reversed(range(size)):
        rest = forward[row] - sum(lower[k][row] * found[k] for k in range(row + 1, size))
        found[row] = rest / lower[row][row]
    return [found[row] for row in range(size)]
