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
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.methods.lowrank.lora import low_rank
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@register(
    kind="adapter",
    paper="OLoRA, Büyükakyüz 2024, arXiv 2406.01775",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(ScaleOptions)
def olora(options: ScaleOptions) -> Transform:
    """Low-rank adaptation from an orthonormal start (arXiv 2406.01775).

    Raises:
        PeftError: as `lora`; in `init`, when a base is not a plain array.
    """
    return low_rank("olora", options, _start, rslora=options.rslora)


def _start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Array]:
    q, r = jnp.linalg.qr(plain_matrices("olora", target, leaf).swapaxes(-1, -2))
    a = r[..., : target.rank, :]
    b = q[..., :, : target.rank].swapaxes(-1, -2)
    return a, b, residual(leaf, a, b, target)
