"""PST: sparse training of which both the update and the importance of each weight are low-rank.

Paper: Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", IJCAI 2022, arXiv
2205.11005.

    V = W + s·aᵀb      S = |V| + cᵀd + p 1ᵀ + 1 qᵀ      a, c [r, in], b, d [r, out], p [in], q [out]
    y = x·(V ∘ M)      M = 0 at the ⌊sparsity · n·m⌋ smallest S of each matrix, or n:m along its inputs
    dM passes to S as it is:   with G = xᵀg,   dS = G ∘ V,   dV = G ∘ (M + |V|)

Trained: (r + r' + 1)(in + out) numbers a weight, float32; b, d ~ N(0, init_scale²), the others 0, so that
pruning starts by magnitude. The share grows cubically from `initial_sparsity` (`_gradual.py`); `frozen.state`
holds the number of pruned entries. Merged, the weights are dense arrays with those zeros. Backward keeps x
and one threshold. Defaults: r = r' = 8, scales of 1, warm-ups of 0.1 and 0.3 of the steps, as released.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.sparse._gradual import PRUNED, Gradual, prune
from peftjax.methods.sparse._patterns import parsed, require_fits
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.score_pruned import Pattern, ScorePruned


@dataclass(frozen=True, kw_only=True)
class PstOptions(RankOptions):
    """Those of `pst`.

    Attributes:
        sparsity: the share of each matrix that is pruned in the end.
        pattern: 'n:m' instead: of each m consecutive inputs of an output n are kept, from the start on.
        total_steps: optimizer steps of the training; needed without a pattern.
        initial_sparsity: the share that is pruned at first.
        init_warmup: steps before it grows; by default a tenth of them.
        final_warmup: steps that have the final share; by default three tenths.
        prune_every: steps between two changes of the share.
        importance_rank: r' of the scores; by default that of the update, 0 is rows and columns alone.
        scale: s, of the update.
        init_scale: standard deviation of b and d at the start.
    """

    sparsity: float = 0.9
    pattern: str | None = None
    total_steps: int | None = None
    initial_sparsity: float = 0.0
    init_warmup: int | None = None
    final_warmup: int | None = None
    prune_every: int = 1
    importance_rank: int | None = None
    scale: float = 1.0
    init_scale: float = 1.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range, but for those of the schedule."""
        super().require_valid(caller)
        at_least(caller, "importance_rank", self.importance_rank, 0)
        positive(caller, "scale", self.scale)
        positive(caller, "init_scale", self.init_scale)
        if self.n_of_m is None and self.total_steps is None:
            raise PeftError(f"{caller}: the pruned share grows over total_steps; give them, or a pattern")

    @property
    def n_of_m(self) -> Pattern | None:
        """The pattern as numbers."""
        return parsed("pst", self.pattern)

    @property
    def gradual(self) -> Gradual:
        """When how much is pruned."""
        steps = self.total_steps or 0
        first = steps // 10 if self.init_warmup is None else self.init_warmup
        last = 3 * steps // 10 if self.final_warmup is None else self.final_warmup
        return Gradual(
            sparsity=self.sparsity,
            initial_sparsity=self.initial_sparsity,
            total_steps=steps,
            init_warmup=first,
            final_warmup=last,
            every=self.prune_every,
        )

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with its rank."""
        found = super().find(caller, params, one_way=one_way, **ranks)
        require_fits(caller, self.n_of_m, found)
        return found


@register(
    kind="adapter",
    paper="PST, Li et al. 2022, arXiv 2205.11005",
    trains="(r + r' + 1)·(in + out)",
    backward_keeps="the input x (shared) and a threshold",
    of_steps=lambda steps: {"total_steps": steps},
    conformance=Conformance(
        example={"rank": 2, "importance_rank": 1, "initial_sparsity": 0.3, "total_steps": 20},
        starts_as_base=False,
    ),
)
@takes(PstOptions)
def pst(options: PstOptions) -> Transform:
    """Prune the targeted weights while they are tuned (arXiv 2205.11005).

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or a pattern that do not fit
            the parameters.
    """
    pattern = options.n_of_m
    gradual = options.gradual if pattern is None else None

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        rank = target.rank if options.importance_rank is None else options.importance_rank
        (n, m), stack, keys = target.layout.matrix, target.stack, jax.random.split(key)
        trained = {
            "a": jnp.zeros((*stack, target.rank, n)),
            "b": options.init_scale * jax.random.normal(keys[0], (*stack, target.rank, m)),
            "inputs": jnp.zeros((*stack, n)),
            "outputs": jnp.zeros((*stack, m)),
        }
        if rank:
            trained["c"] = jnp.zeros((*stack, rank, n))
            trained["d"] = options.init_scale * jax.random.normal(keys[1], (*stack, rank, m))
        pruned = 1 if gradual is None else int(options.initial_sparsity * n * m)
        return trained, {PRUNED: jnp.full(stack, pruned, jnp.int32)}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> ScorePruned:
        own = {name: slot for name, slot in slots.items() if name != PRUNED}
        return ScorePruned(base, own, slots[PRUNED], target.layout, options.scale, pattern)

    advances = () if gradual is None else (prune(gradual),)
    return of_weights("pst", options, start, weight, one_way=True, advances=advances)
