"""AdaMSS: the outputs of a weight in clusters, and a low-rank update of its own for each.

Paper: Zheng et al., "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", NeurIPS
2025.

    [W; c] ≈ (u·s·v)ᵀ      the first R singular directions of a weight and its bias: u [out, R], v [R, in + 1]
    k(o) = the cluster of row o of u, of K, by k-means
    y_o = x·W_o + c_o + Σ_i b_oi · (a_k(o),i · v·[x; 1])      a [K, r, R], b [out, r]

Trained: a and b, K·r·R + r·out numbers a weight, float32; v is frozen. a starts from the first singular
directions of each cluster, b is 0. With `target_subspaces` clusters stop being trained as training goes on,
those first that matter least (`methods/_importance.py`). Backward keeps x and K·r numbers a token. Defaults
are those of the usual PyTorch library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import at_least, fraction, positive
from peftjax.core.errors import PeftError
from peftjax.methods._importance import sensitivities, track_importance
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target
from peftjax.methods._warmups import BetweenWarmups
from peftjax.methods._weights import Slots, Start, of_weights
from peftjax.methods.lowrank._base import base_matrices
from peftjax.methods.lowrank._clusters import clustered, first_directions
from peftjax.methods.lowrank._ranks import keep
from peftjax.transform.around import Around, Own, require_given
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Advance, Loss, Transform
from peftjax.weights.derived import Derived
from peftjax.weights.sharding import like, whole
from peftjax.weights.stack_members import over_stack

ACTIVE = "active"
"""The slot of the clusters that are still trained, bool `[*stack, K]`."""


@dataclass(frozen=True, kw_only=True)
class AdamssOptions(TargetOptions):
    """Those of `adamss`.

    Attributes:
        rank: R of the frozen directions, or the smaller side of a weight.
        subspaces: K, the clusters of a weight.
        subspace_rank: r, the rank of each.
        threshold: leave out directions of a cluster whose squared singular value is at most this share of its
            largest; by default none.
        seed: of the decomposition.
        target_subspaces: how many clusters of all weights are trained in the end; by default all.
        init_warmup: the step from which on clusters stop being trained.
        final_warmup: the step at which the last of them do.
        allocate_every: steps between two choices.
        beta1: decay of the average importance.
        beta2: decay of its average deviation.
        exponent: of the schedule; the larger, the sooner clusters stop.
    """

    rank: int = 100
    subspaces: int = 5
    subspace_rank: int = 1
    threshold: float | None = None
    seed: int = 0
    target_subspaces: int | None = None
    init_warmup: int = 50
    final_warmup: int = 1000
    allocate_every: int = 100
    beta1: float = 0.85
    beta2: float = 0.85
    exponent: float = 3.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        counts = ("rank", "subspaces", "subspace_rank", "target_subspaces", "allocate_every", "exponent")
        for name in counts:
            positive(caller, name, getattr(self, name))
        at_least(caller, "seed", self.seed, 0)
        at_least(caller, "init_warmup", self.init_warmup, 0)
        for name in ("beta1", "beta2", *(() if self.threshold is None else ("threshold",))):
            fraction(caller, name, getattr(self, name))
        if self.init_warmup >= self.final_warmup:
            raise PeftError(
                f"{caller}: init_warmup {self.init_warmup} is not before final_warmup {self.final_warmup}; "
                "lower it"
            )

    def count(self, target: Target) -> int:
        """K of a weight."""
        return min(self.subspaces, target.layout.matrix[1])


@register(
    kind="adapter",
    paper="AdaMSS, Zheng et al. 2025, NeurIPS",
    trains="K·r·R + r·out",
    backward_keeps="the input x (shared) and K·r numbers",
    conformance=Conformance(example={"rank": 4, "subspaces": 2, "subspace_rank": 1}),
)
@takes(AdamssOptions)
def adamss(options: AdamssOptions) -> Transform:
    """Train a low-rank update for each cluster of a weight's outputs (AdaMSS, NeurIPS 2025).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters.
    """
    budget = options.target_subspaces

    def begin(leaves: Mapping[str, Any], targets: Sequence[Target]) -> tuple[None, Start]:
        biases = {tree.module_of(path): path for path in tree.biases(leaves)}

        def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
            rows = [base_matrices(target, base)]
            if (path := biases.get(tree.module_of(target.path))) is not None:
                bias = whole(leaves[path]).reshape(*target.layout.stack, 1, -1).astype(jnp.float32)
                rows.append(bias if target.layers is None else bias[jnp.asarray(target.layers)])

            def of_one(w: Array) -> Slots:
                return _directions(w, options, options.count(target))

            found = over_stack(of_one, len(target.stack))(jnp.concatenate(rows, axis=-2))
            n, m = target.layout.matrix
            a, v = found["a"], found["v"]
            kept = {"v": v[..., :n], "cluster": found["cluster"]}
            if len(rows) > 1:
                kept["of_bias"] = v[..., n]
            if budget is not None:
                kept[ACTIVE] = jnp.ones(a.shape[:-2], bool)
            return {"a": a, "b": jnp.zeros((*target.stack, m, a.shape[-2]))}, kept

        return None, start

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Derived:
        own = {name: slots[name] for name in ("a", "b", "v", "cluster")}
        return Derived(base, own, {}, target.layout, _factors)

    around, advances = None, ()
    if budget is not None:
        left = freeze_inactive()
        averages = track_importance("adamss", options.beta1, options.beta2, ("a", "b"))
        around = Around(left, optax.chain(left, averages))
        advances = (_choose(options, budget),)
    return of_weights(
        "adamss",
        options,
        None,
        weight,
        begin=begin,
        bias=_bias,
        around=around,
        advances=advances,
        one_way=True,
    )


def _directions(w: Array, options: AdamssOptions, count: int) -> Slots:
    """What belongs to one weight `[in, out]`, its bias the last row: v, the clusters, and a at first."""
    basis = first_directions(w.T, options.rank, options.seed)
    cluster = clustered(basis.left, count)
    own = basis.left * jax.nn.one_hot(cluster, count, axis=0)[..., None]  # [K, out, R]
    sizes, directions = jnp.linalg.eigh(own.swapaxes(-1, -2) @ own)
    r = min(options.subspace_rank, len(basis.right))
    sizes, a = sizes[..., ::-1][..., :r], directions[..., ::-1][..., :r].swapaxes(-1, -2)
    largest = jnp.take_along_axis(a, jnp.argmax(jnp.abs(a), axis=-1, keepdims=True), axis=-1)
    # Of a cluster of fewer rows, or small directions, the rest is zero for good: so is its gradient.
    real = jnp.arange(r) < jnp.bincount(cluster, length=count)[:, None]
    if options.threshold is not None:
        real &= (sizes > options.threshold * sizes[:, :1]) | (jnp.arange(r) == 0)
    a = a * jnp.where(largest < 0.0, -1.0, 1.0) * real[..., None]
    return {"v": basis.right, "cluster": cluster, "a": a}


def _factors(shared: Mapping[str, Array], slots: Mapping[str, Array]) -> tuple[Array, Array]:
    """The factors `[K·r, in]` and `[K·r, out]` of one matrix, the second zero outside of each cluster."""
    count, r, rank = slots["a"].shape
    own = jax.nn.one_hot(slots["cluster"], count, axis=0)[:, None] * slots["b"].T
    return slots["a"].reshape(count * r, rank) @ slots["v"], own.reshape(count * r, -1)


def _bias(bias: Array, slots: Mapping[str, Array], target: Target, base: Any) -> Array:
    """The bias with what its own row of v adds to it."""

    def of_one(a: Array, b: Array, of_bias: Array, cluster: Array) -> Array:
        return jnp.sum((a @ of_bias)[cluster] * b, axis=-1)

    arrays = (slots[name] for name in ("a", "b", "of_bias", "cluster"))
    return bias + like(over_stack(of_one, len(target.layout.stack))(*arrays), bias)


def freeze_inactive() -> optax.GradientTransformationExtraArgs:
    """Zero what belongs to clusters that are no longer trained."""

    def update(
        updates: Own, state: Any, params: Own | None = None, *, frozen: Frozen | None = None, **extra: Any
    ) -> tuple[Own, Any]:
        held = require_given("adamss", params, frozen).state

        def left(path: str, name: str, value: Any) -> Any:
            if isinstance(value, optax.MaskedNode):
                return value
            active = held[path][ACTIVE]
            if name == "b":
                return jnp.where(
                    jnp.take_along_axis(active, held[path]["cluster"], axis=-1)[..., None], value, 0.0
                )
            return jnp.where(active[..., None, None], value, 0.0)

        return {
            path: {name: left(path, name, value) for name, value in slots.items()}
            for path, slots in updates.items()
        }, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _choose(options: AdamssOptions, budget: int) -> Advance:
    """Stop training the clusters that matter least, whenever that is due; none comes back."""
    first, last, every = options.init_warmup, options.final_warmup, options.allocate_every
    choices = BetweenWarmups(total_steps=last, init_warmup=first, final_warmup=0, every=every)

    def cut(step: Array, total: int) -> Array:
        """How many of all are not trained after so many steps."""
        steps = np.arange(first, last + 1)
        share = (1.0 - (steps - first) / (last - first)) ** options.exponent
        end = min(budget, total)
        left = np.floor(end + (total - end) * share).astype(np.int32)
        return total - jnp.asarray(left)[jnp.clip(jnp.asarray(step) - first, 0, last - first)]

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
        mean: dict[str, Any] = {}
        deviation: dict[str, Any] = {}
        for _, averages in optimizer.after():
            mean |= averages.mean
            deviation |= averages.deviation
        paths = [target.path for target in frozen.plan if target.path in mean]
        if not paths:
            return frozen, trainable, optimizer
        held = {path: frozen.state[path] for path in paths}
        total = sum(held[path][ACTIVE].size for path in paths)
        active = {path: held[path][ACTIVE] for path in paths}
        kept = keep(_scores(mean, deviation, held), active, cut(step, total))
        state = dict(frozen.state)
        for path, own in kept.items():
            state[path] = {**state[path], ACTIVE: own & active[path]}
        return replace(frozen, state=state), trainable, optimizer

    return Advance(choices.due, run, changes=(ACTIVE,))


def _scores(mean: Any, deviation: Any, held: Mapping[str, Slots]) -> dict[str, Array]:
    """How much each cluster matters, `[*stack, K]` by path."""
    found = {}
    for path, own in sensitivities(mean, deviation).items():
        count = own["a"].shape[-3]
        rows = jax.nn.one_hot(held[path]["cluster"], count)  # [*stack, out, K]
        of_b = jnp.einsum("...ok,...o->...k", rows, own["b"].mean(axis=-1))
        of_b /= jnp.maximum(rows.sum(axis=-2), 1.0)
        found[path] = own["a"].mean(axis=(-2, -1)) + of_b
    return found
