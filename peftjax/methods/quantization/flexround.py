"""FlexRound: learn which whole number each weight is rounded to, by a division before the rounding.

Papers: Lee et al., "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training
Quantization", ICML 2023, arXiv 2306.00317; LRQ, Lee et al. 2024, arXiv 2407.11534.

    W' = W / (S2 ∘ s3)      Ŵ = s1 ∘ (clip(round(W' / s1) + z) - z)        [in, out], s1 and z for each group

    s1 = step · exp(d1),  S2 = exp(d2),  s3 = exp(d3)           LRQ: d2 = UᵀL + r2 + c2 of rank r

    dd2 = -dŴ ∘ W' where W' is within reach, else 0             dd1 = Σ dŴ ∘ (Ŵ - W'·1[within])

Trained, float32: d1, out · groups; d2, in · out, or r·(in + out) + in + out with `rank`; d3, out. All start
from 0 (U does not), where Ŵ is W rounded to the nearest, and are cut to ±log 4. W is frozen and stays a float
in training; in the end there are codes, s1 and z alone. Backward keeps x, W and what is trained, and rounds
again.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.methods._targets import key_for
from peftjax.methods.quantization._base import codings
from peftjax.methods.quantization.quantized import FormatOptions
from peftjax.quantize.codes import decode
from peftjax.quantize.elements import Integers
from peftjax.quantize.formats import FORMATS
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.coding import Coding, coded_weight, rows_of
from peftjax.weights.divided import Divided
from peftjax.weights.factored import Factored
from peftjax.weights.layout import Layout
from peftjax.weights.rounded import Rounded

_SCALES = ("float32", "bfloat16", "float16", "e8m0")


@dataclass(frozen=True, kw_only=True)
class FlexRoundOptions(FormatOptions):
    """Those of `quantized`, of whole numbers alone.

    Attributes:
        format: int8, int4, int3 or int2.
        scales: float32, bfloat16, float16 or e8m0, to which every forward pass rounds the trained step.
        rank: that of LRQ's factors of d2, in matrices whose factors are fewer numbers than they have; None
            trains a d2 for each weight.
    """

    rank: int | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "rank", self.rank)
        whole = [name for name, form in FORMATS.items() if isinstance(form.element, Integers)]
        one_of(caller, "format", self.format, whole)
        one_of(caller, "scales", self.form.scales, _SCALES)


@register(
    kind="adapter",
    paper="FlexRound, Lee et al. 2023, arXiv 2306.00317; with `rank` LRQ, arXiv 2407.11534",
    trains="in · out + out · (groups + 1); with `rank` r·(in + out) + in + out · (groups + 2)",
    backward_keeps="the input x (shared)",
    quantized_base=False,
    conformance=Conformance(example={"format": "int4", "group": 4}, starts_as_base=False),
)
@takes(FlexRoundOptions)
def flexround(options: FlexRoundOptions) -> Transform:
    """Train how the targeted weights are rounded to whole numbers (arXiv 2306.00317).

    It starts as `quantized` with the same options. `merge` gives the rounded arrays, and
    `peftjax.weights.rounded.with_codes(method.apply(frozen, trainable))` the same model as codes.
    `pj.calibrate.reconstruct` trains it one block after the other, as the paper does.

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((64, 8))}}
        >>> frozen, trainable = pj.flexround(format="int4", group=32).init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, trainable)
        {'up/kernel': {'log': (64, 8), 'log_output': (8,), 'log_step': (8, 2)}}
    """
    form = options.form

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        paths, found = codings("flexround", form, options, params)
        if coded := set(paths) - found.keys():
            raise PeftError(
                f"flexround: {min(coded)!r} is a Quantized of an earlier method, and rounded already; "
                "flexround rounds floats, so put it in that method's place"
            )
        leaves, state, trainable = tree.named_leaves(params), {}, {}
        for path, coding in found.items():
            codes = coded_weight(leaves[path], coding.layout, form).codes
            state[path] = {"step": decode(codes.scales).astype(jnp.float32)}
            if codes.zeros is not None:
                state[path]["zeros"] = codes.zeros
            start = {"log_step": jnp.zeros(codes.scales.shape, jnp.float32)}
            logs = _logs(key_for(key, path), leaves[path], coding.layout, options.rank)
            trainable[path] = start | logs
        return Frozen(params, state, tuple(found.items())), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        leaves = tree.named_leaves(frozen.params)
        rounded = {
            path: _rounded(leaves[path], coding, frozen.state[path], trainable[path])
            for path, coding in frozen.plan
        }
        return tree.replace(frozen.params, rounded)

    return Transform("flexround", {}, init, apply)


def _logs(key: Array, w: Any, layout: Layout, rank: int | None) -> dict[str, Array]:
    """The logarithms of what divides a weight, where they divide by 1."""
    (n, m), stack = layout.matrix, layout.stack
    nothing = {"log_output": jnp.zeros((*stack, m), jnp.float32)}
    if rank is None or rank * (n + m) >= n * m:
        return {"log": jnp.zeros_like(w, jnp.float32), **nothing}
    bound = math.sqrt(6 / n)  # Kaiming's
    return {
        "left": jnp.zeros((*stack, rank, m), jnp.float32),
        "right": jax.random.uniform(key, (*stack, rank, n), jnp.float32, -bound, bound),
        "by_output": jnp.zeros((*stack, m), jnp.float32),
        "by_input": jnp.zeros((*stack, n), jnp.float32),
        **nothing,
    }


def _rounded(w: Array, coding: Coding, start: dict[str, Array], trained: dict[str, Array]) -> Rounded:
    """The weight as it is rounded, from float32."""
    layout, logs, exact = coding.layout, dict(trained), jnp.dtype(jnp.float32)
    log_step = logs.pop("log_step")
    if "left" in logs:
        logs["log"] = Factored(logs.pop("right"), logs.pop("left"), layout, exact)
    divided = Divided(w, layout=layout, of_dtype=exact, **logs)
    return Rounded(divided, layout, coding.format, rows_of(layout), w.dtype, log_step=log_step, **start)
