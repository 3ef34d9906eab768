"""Structured feed-forward layers: products of thin or block-diagonal matrices, trained in place of weights.

Paper: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward
Layers", NeurIPS 2024, arXiv 2406.16450.

    low_rank        y = (x·U)·V                       U [in, r], V [r, out]
    block_dense     y = (x·diag(D_1 ... D_b))·L       D [b, in/b, r/b], L [r, out]
    block_shuffle   h = x·diag(D_1 ... D_b), shuffled; y = h·diag(E_1 ... E_b), shuffled
                                                      D [b, in/b, q], E [b, q, out/b], q = min(in, out) / b
    with a guide    y = ρ·x·W + (1 - ρ)·f(x)          W [in, out], ρ from 1 to 0 in `guide_steps`

Trained: those factors, W while there is a guide, and, unless `train_rest=False`, all other parameters.
Backward keeps x, which the layer shares. A shuffle takes element i·b + l to place i of block l. W starts as
the image of f, so that ρ does not matter at first. Factors start as the SVD of the weight given (low_rank) or
N(0, 1/fan_in), or with `start="orthogonal"` as its polar factor. Defaults: r = 256, b = 4, no guide.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import at_least, one_of, positive
from peftjax.core.errors import PeftError
from peftjax.core.linalg import balanced, svd_of
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots
from peftjax.methods.structured._trained import TrainedOptions, of_trained_weights
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Advance, Loss, Transform
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_logical
from peftjax.weights.functional import Functional
from peftjax.weights.mapped import Mapped
from peftjax.weights.scaled import Scaled
from peftjax.weights.stack_members import over_stack

Form = Literal["low_rank", "block_dense", "block_shuffle"]
FIRST, SECOND, GUIDE, SHARE = "first", "second", "guide", "share"


@dataclass(frozen=True, kw_only=True)
class StructuredFfnOptions(TrainedOptions):
    """Those of `structured_ffn`.

    Attributes:
        form: of the weights; see above.
        rank: r, of 'low_rank' and 'block_dense'.
        blocks: b, of the forms with blocks.
        start: of the factors: 'spectral', of 'low_rank', drawn from a 'normal' distribution, or 'orthogonal';
            None is 'spectral' for 'low_rank' and else 'normal'.
        guide_steps: steps with a dense guide, the paper's half of all; 0 for none.
        guide_shape: how ρ falls.
    """

    form: Form = "low_rank"
    rank: int = 256
    blocks: int = 4
    start: Literal["spectral", "normal", "orthogonal"] | None = None
    guide_steps: int = 0
    guide_shape: Literal["cosine", "linear"] = "cosine"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "form", self.form, get_args(Form))
        positive(caller, "rank", self.rank)
        positive(caller, "blocks", self.blocks)
        one_of(caller, "start", self.start, (None, "spectral", "normal", "orthogonal"))
        at_least(caller, "guide_steps", self.guide_steps, 0)
        one_of(caller, "guide_shape", self.guide_shape, ("cosine", "linear"))
        if self.start == "spectral" and self.form != "low_rank":
            raise PeftError(f"{caller}: start 'spectral' is of the form 'low_rank'; choose another start")


@register(
    kind="adapter",
    paper="structured feed-forward layers, Wei et al. 2024, arXiv 2406.16450",
    trains="r·(in + out), or of blocks; and all that is not targeted",
    backward_keeps="the input x (shared)",
    quantized_base=False,
    conformance=Conformance(example={"rank": 2}, starts_as_base=False),
)
@takes(StructuredFfnOptions)
def structured_ffn(options: StructuredFfnOptions) -> Transform:
    """Weights that are products of thin or block-diagonal matrices (arXiv 2406.16450).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, a
            rank or number of blocks that does not fit a weight, or a base that is not a plain array.
    """

    def start(key: Array, target: Target, w: Array) -> tuple[Slots, Slots]:
        factors = _started(key, target, w, options)
        if not options.guide_steps:
            return factors, {}
        n, stack = target.layout.matrix[0], target.stack
        unit = jnp.broadcast_to(jnp.eye(n), (*stack, n, n))
        guide = over_stack(Structured(options.form), len(stack))(factors, unit)
        return {**factors, GUIDE: guide}, {SHARE: jnp.ones(stack)}

    def weight(target: Target, dtype: str, slots: Mapping[str, Array]) -> Weight:
        layout, form = target.layout, Structured(options.form)
        if GUIDE not in slots:
            return Functional(slots, layout, form, dtype)
        guide = Scaled(to_logical(slots[GUIDE], layout).astype(dtype), slots[SHARE], layout)
        own = {FIRST: slots[FIRST], SECOND: slots[SECOND], SHARE: 1.0 - slots[SHARE]}
        return Mapped(guide, own, layout, form, "beside")

    advances = (Advance(lambda step: step <= options.guide_steps, _faded(options), (SHARE,)),)
    return of_trained_weights(
        "structured_ffn",
        options,
        start,
        weight,
        one_way=True,
        advances=advances if options.guide_steps else (),
    )


@dataclass(frozen=True)
class Structured:
    """The map f of one matrix, times `share` where there is one."""

    form: Form

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """Of x `[..., in]`."""
        first, second = (slots[name].astype(x.dtype) for name in (FIRST, SECOND))
        h = x @ first if self.form == "low_rank" else _by_blocks(x, first)
        if self.form == "block_shuffle":
            blocks = len(second)
            # Element i·b + l goes to place i of block l, and back.
            h = h.reshape(*h.shape[:-1], -1, blocks).swapaxes(-1, -2).reshape(h.shape)
            y = _by_blocks(h, second)
            y = y.reshape(*y.shape[:-1], blocks, -1).swapaxes(-1, -2).reshape(y.shape)
        else:
            y = h @ second
        return y * slots[SHARE].astype(y.dtype) if SHARE in slots else y


def _by_blocks(x: Array, blocks: Array) -> Array:
    """X times the block-diagonal matrix of `blocks [b, p, q]`."""
    y = jnp.einsum("...lp,lpq->...lq", x.reshape(*x.shape[:-1], len(blocks), -1), blocks)
    return y.reshape(*x.shape[:-1], -1)


def _started(key: Array, target: Target, w: Array, options: StructuredFfnOptions) -> dict[str, Array]:
    (n, m), r, b = target.layout.matrix, options.rank, options.blocks
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "low_rank": ((n, r), (r, m)),
        "block_dense": ((b, n // b, r // b), (r, m)),
        "block_shuffle": ((b, n // b, min(n, m) // b), (b, min(n, m) // b, m // b)),
    }
    divided = {"low_rank": (), "block_dense": (n, r), "block_shuffle": (n, m)}[options.form]
    if options.form != "block_shuffle" and r > min(n, m):
        raise PeftError(
            f"structured_ffn: rank {r} is larger than {target.path!r}, a matrix of {n} x {m}; lower rank or "
            "exclude it"
        )
    if any(size % b for size in divided):
        raise PeftError(
            f"structured_ffn: {b} blocks do not divide {' and '.join(map(str, divided))}, of "
            f"{target.path!r}; choose another number, or exclude it"
        )
    kind = options.start or ("spectral" if options.form == "low_rank" else "normal")
    if kind == "spectral":
        a, second = balanced(svd_of(w), r)
        return {FIRST: a.swapaxes(-1, -2), SECOND: second}
    draw: Callable[[Array, tuple[int, ...]], Array] = _orthogonal if kind == "orthogonal" else _normal
    pairs = zip((FIRST, SECOND), jax.random.split(key), shapes[options.form])
    return {name: draw(own, (*target.stack, *shape)) for name, own, shape in pairs}


def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape) / math.sqrt(shape[-2])


def _orthogonal(key: Array, shape: tuple[int, ...]) -> Array:
    svd = svd_of(jax.random.normal(key, shape))
    return svd.u @ svd.vt


def _faded(options: StructuredFfnOptions) -> Callable[..., tuple[Frozen, Trainable, OptimizerState]]:
    """The advance that gives the guide its share in the step that follows."""

    def run(
        loss: Loss | None,
        frozen: Frozen,
        trainable: Trainable,
        optimizer: OptimizerState,
        *,
        step: Array,
        key: Array,
        part: int,
    ) -> tuple[Frozen, Trainable, OptimizerState]:
        done = jnp.minimum(step.astype(jnp.float32) / options.guide_steps, 1.0)
        share = 1.0 - done if options.guide_shape == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        state: Any = {
            path: {
                name: jnp.full_like(slot, share) if name == SHARE else slot for name, slot in slots.items()
            }
            for path, slots in frozen.state.items()
        }
        return replace(frozen, state=state), trainable, optimizer

    return run
