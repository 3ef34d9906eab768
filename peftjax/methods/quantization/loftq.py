"""LoftQ: LoRA whose factors start from what quantization loses.

Paper: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024, arXiv
2310.08659.

    Q = q(W - s·aᵀb)        s·aᵀb = the first r terms of the SVD of W - Q        T times in turn

The base is Q, in any format, and the model starts near the original one, nearer than the rounded one.
Rounding is no projection, so that a step may make the error larger: of all of them, the one with the smallest
‖W - Q - s·aᵀb‖ counts, matrix by matrix, and more steps are never worse. No data is needed. With
`start="principal"` the first factors are those of W itself, as PiSSA's on a quantized base are (arXiv
2404.02948).

Trained and kept by backward: as LoRA.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from peftjax.core.checks import one_of, positive
from peftjax.core.linalg import balanced, svd_of
from peftjax.methods.lowrank._factors import ScaledTarget, plain_matrices, zeros
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.methods.lowrank.lora import low_rank
from peftjax.methods.quantization.quantized import Nf4CodeOptions
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.canonical import to_canonical, to_logical
from peftjax.weights.coding import code_shardings, coded_weight
from peftjax.weights.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class LoftqOptions(ScaleOptions, Nf4CodeOptions):
    """Those of `lora` but `init`, those of `quantized` with NF4's double quantization as defaults, and more.

    Attributes:
        iterations: T; the paper uses 1 or 5.
        start: of the first factors: 'zero', so that the first codes are those of the weight, or 'principal'.
    """

    iterations: int = 5
    start: Literal["zero", "principal"] = "zero"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        ScaleOptions.require_valid(self, caller)
        Nf4CodeOptions.require_valid(self, caller)
        positive(caller, "iterations", self.iterations)
        one_of(caller, "start", self.start, ("zero", "principal"))


@register(
    kind="adapter",
    paper="LoftQ, Li et al. 2023, arXiv 2310.08659",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "iterations": 2}, starts_as_base=False),
)
@takes(LoftqOptions)
def loftq(options: LoftqOptions) -> Transform:
    """Low-rank adaptation of a quantized base that starts from the rounding error (arXiv 2310.08659).

    Raises:
        PeftError: as `lora`; here for an option out of range; in `init`, when a base is not a plain array.

    Examples:
        >>> params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}}
        >>> frozen, trainable = pj.loftq(rank=2).init(jax.random.key(0), params)
        >>> frozen.params["up"]["kernel"].codes.codes.dtype.name
        'uint8'
    """
    form = options.form

    def alternate(w: Array, target: ScaledTarget) -> tuple[Array, Array, Quantized]:
        """Factors and codes of float32 matrices `[*stack, in, out]`."""

        def leading(rest: Array) -> tuple[Array, Array]:
            svd = svd_of(rest)
            return balanced(svd._replace(sizes=svd.sizes / target.scale), target.rank)

        def product(a: Array, b: Array) -> Array:
            return target.scale * jnp.einsum("...rn,...rm->...nm", a, b)

        def coded(rest: Array) -> tuple[Quantized, Array]:
            codes = coded_weight(to_logical(rest, target.layout), target.layout, form)
            return codes, to_canonical(codes.dense(), target.layout)

        def error(a: Array, b: Array, decoded: Array) -> Array:
            return jnp.sum((w - decoded - product(a, b)) ** 2, (-1, -2))

        def step(_: Any, carry: Any) -> Any:
            a, b, best = carry
            codes, decoded = coded(w - product(a, b))
            a, b = leading(w - decoded)
            made = (error(a, b, decoded), a, b, codes)
            better = made[0] < best[0]

            def chosen(new: Array, old: Array) -> Array:
                return jnp.where(better.reshape(*better.shape, *(1,) * (new.ndim - better.ndim)), new, old)

            return a, b, jax.tree.map(chosen, made, best)

        nothing = zeros(target)
        codes, decoded = coded(w)
        first = leading(w) if options.start == "principal" else nothing
        begun = (*first, (error(*nothing, decoded), *nothing, codes))
        _, _, (_, a, b, codes) = lax.fori_loop(0, options.iterations, step, begun)
        return a, b, codes

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Quantized]:
        w = plain_matrices("loftq", target, leaf)
        a, b, codes = jax.jit(alternate, static_argnums=1)(w, target)
        codes, sharding = codes.cast(leaf.dtype), getattr(leaf, "sharding", None)
        if isinstance(leaf, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
            return a, b, codes
        return a, b, jax.device_put(codes, code_shardings(codes, sharding))

    return low_rank("loftq", options, start, rslora=options.rslora)
