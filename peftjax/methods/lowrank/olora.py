"""OLoRA: LoRA whose factors start as the leading part of a QR factorization of each weight.

Paper: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.

    Wᵀ = Q R      b = Q[:, :r]ᵀ      a = R[:r]      base = W − s·aᵀb

Trained and kept by backward: as LoRA. The base given to `init` is not changed: the residual is a new
array in the frozen parameters. The start needs a plain floating-point base.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.methods.lowrank._factors import ScaledTarget, plain_matrices, residual
from peftjax.methods.lowrank.lora import checked_options, low_rank
from peftjax.transform.transform import MethodInfo, Transform


def olora(**options: Any) -> Transform:
    """Low-rank adaptation from an orthonormal start (arXiv 2406.01775).

    Args:
        **options: those of `lora`, `init` excepted.

    Raises:
        PeftError: as `lora`; in `init`, when a base is not a plain array.
    """
    return low_rank("olora", checked_options("olora", options, leave_out=("init",)), _start)


def _start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Array]:
    q, r = jnp.linalg.qr(plain_matrices("olora", target, leaf).swapaxes(-1, -2))
    a = r[..., : target.rank, :]
    b = q[..., :, : target.rank].swapaxes(-1, -2)
    return a, b, residual(leaf, a, b, target)


METHOD = MethodInfo(
    name="olora",
    factory=olora,
    paper="OLoRA, Büyükakyüz 2024, arXiv 2406.01775",
    trains="r·(in + out)",
    keeps="the input x (shared) and x·aᵀ",
    quantized_base=False,
    replaces_base=True,
    example={"rank": 2, "alpha": 4.0},
)
