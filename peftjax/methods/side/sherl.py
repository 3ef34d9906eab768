"""SHERL: the early layers of a frozen backbone, merged without redundancy, go through its last layer.

Diao et al. 2024, arXiv 2407.07523. From the states H_0 ... H_{L-1} [B, S, D] before each layer, detached,
with d = D / factor; s and t run over the layers below the guide g = X_{L-1}, for every token apart:

    X_s = LN(H_s W_s + b_s)  [B, S, d]
    r_s = Σ_t relu(cos(X_s, X_t))                 how redundant layer s is, 1 or more
    e_s = relu(w · (X_s * g) + b) / r_s           p_s = e_s / (Σ_t e_t + 1e-8)
    z   = Σ_s p_s X_s + g
    u   = LN(relu(z) W_o + b_o) + tanh(γ / 0.1) H_{L-1}
    H_L = Block_L(u)                              the frozen last layer, whose output the head reads

Trained: all of that, D d + 3 d a layer, D d + 3 D + d + 2 for all. Backward keeps H_s and X_s of every
layer, D + d numbers a token, and what the last layer alone keeps.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.backbone.backbone import Backbone, Layer, Stack
from peftjax.backbone.context import Context
from peftjax.backbone.functional import Part, linear_init, linear_norm, norm_init
from peftjax.backbone.layers import dropout, recompute
from peftjax.backbone.protocols import Cache, DropoutKey
from peftjax.backbone.rewriting import require_backbone, require_one_stack, require_scan, stacks_of
from peftjax.core.checks import fraction, positive
from peftjax.core.errors import PeftError
from peftjax.methods.side._layer_states import (
    states_of,
    states_of_cached,
    unit,
)
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform

NAME = "sherl"
DOWN_EPSILON, OUT_EPSILON = 1e-5, 1e-12
SMALLEST = 1e-8
"""Added to a sum of e; and the smallest norm of X."""
TEMPERATURE = 0.1


@register(
    kind="adapter",
    paper="SHERL, Diao et al. 2024, arXiv 2407.07523",
    trains="(D + 3) d a layer, and D d + 3 D + d + 2 for all, d = D / factor",
    backward_keeps="D + d numbers a token and layer beside the blocks, and what the last layer keeps",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"factor": 2}, starts_as_base=False),
)
def sherl(*, factor: int = 2, dropout: float = 0.1) -> Transform:
    """The early layers merged without what they repeat, through the frozen last layer (arXiv 2407.07523).

    `H_L = Block_L(LN(relu(Σ_s p_s X_s + g) W_o + b_o) + tanh(γ / 0.1) H_{L-1})`.

    Args:
        factor: d = D / factor is the width of X.
        dropout: rate on what the last norm gives.

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, for what is not a backbone with one
            stack of two blocks or more.
    """
    positive(NAME, "factor", factor)
    fraction(NAME, "dropout", dropout)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        stack = stacks_of(NAME, params)[0]
        _require_one_stack(params)
        layers, width, inner = stack.num_layers, stack.width, stack.width // factor
        if not inner:
            raise PeftError(f"{NAME}: factor {factor} is larger than the model's width {width}")
        if layers < 2:
            raise PeftError(f"{NAME}: one layer has no earlier ones to merge; use pj.lora")
        keys = jax.random.split(key, 3)
        confidence = linear_init(keys[1], (inner, 1))
        return Frozen(params), {
            "down": linear_init(keys[0], (layers, width, inner)),
            "down_norm": norm_init((layers, inner)),
            "confidence": {"weight": confidence["kernel"][:, 0], "bias": confidence["bias"][0]},
            "out": linear_init(keys[2], (inner, width)),
            "out_norm": norm_init((width,)),
            "gamma": jnp.zeros(()),
        }

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        own = trainable if key is None else {**trainable, "key": key}
        return {**frozen.params, NAME: own}

    def model(forward: Forward) -> Forward:
        backbone = require_backbone(NAME, forward)
        require_scan(NAME, backbone)
        _require_one_stack(backbone)
        return dataclasses.replace(backbone, stack=LateStack(dropout, backbone.stack))

    return Transform(NAME, {}, init, apply, model)


@dataclasses.dataclass(frozen=True)
class LateStack:
    """The frozen blocks, of which the last one reads the merged states of the others.

    Attributes:
        dropout: rate on what enters it beside H_{L-1}, where there is a key.
        inner: the stack as it was, which knows the blocks' cache.
    """

    name: ClassVar[str] = NAME
    dropout: float
    inner: Stack

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Float[Array, "B S D"]:
        """H_L; the blocks drop out as they do alone."""
        _, states = states_of(model, params, hidden, context, key, run_last=False)

        def run_last(entering: Array, layer: Layer) -> Array:
            return model.run_layer(layer, entering, context)

        entering = self._entering(params[NAME], states)
        return model.checkpointed(run_last)(entering, _last(model, model.layers(params, key)))

    def empty_cache(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> Cache:
        """The cache of the blocks."""
        return self.inner.empty_cache(model, params, hidden, context)

    def run_cached(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context, cache: Cache
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """`run` for further tokens; the last layer runs twice, and what it writes of u stays."""
        _, cache, states = states_of_cached(model, params, hidden, context, cache)
        entering = self._entering(params[NAME], states)
        return model.run_layer_cached(_last(model, model.layers(params)), entering, context, cache)

    def _entering(self, own: Params, states: Float[Array, "L B S D"]) -> Float[Array, "B S D"]:
        """What the last layer reads, u."""

        @recompute
        def narrow(down: Part, norm: Part, state: Array) -> Array:
            return linear_norm(down, norm, state, DOWN_EPSILON)

        @jax.checkpoint
        def widen(own: Params, merged: Array, last: Array) -> Array:
            update = linear_norm(own["out"], own["out_norm"], jax.nn.relu(merged), OUT_EPSILON)
            gate = jnp.tanh(own["gamma"] / TEMPERATURE).astype(last.dtype)
            return dropout(update, self.dropout, own.get("key")) + gate * last

        # A layer at a time, so that backward recomputes what one layer needs.
        narrowed = jax.lax.map(lambda xs: narrow(*xs), (own["down"], own["down_norm"], states))
        return widen(own, merge(own["confidence"], narrowed), states[-1])


@jax.checkpoint
def merge(confidence: Part, narrowed: Float[Array, "L B S d"]) -> Float[Array, "B S d"]:
    """The early layers and the guide, z."""
    early, guide = narrowed[:-1], narrowed[-1]
    shares = shares_of(confidence, early, guide)
    mixed = jnp.einsum("nbs,nbsd->bsd", shares, early.astype(jnp.float32))
    return (mixed + guide.astype(jnp.float32)).astype(guide.dtype)


def shares_of(
    confidence: Part, early: Float[Array, "n B S d"], guide: Float[Array, "B S d"]
) -> Float[Array, "n B S"]:
    """p, in float32: of each token 1 together, or 0."""
    alike = redundancy(early)
    guided = early.astype(jnp.float32) * guide.astype(jnp.float32)
    strength = jax.nn.relu(guided @ confidence["weight"] + confidence["bias"]) / alike
    return strength / (strength.sum(axis=0) + SMALLEST)


def redundancy(early: Float[Array, "n B S d"]) -> Float[Array, "n B S"]:
    """r, in float32."""
    directions = unit(early, SMALLEST)
    cosines = jnp.einsum("nbsd,mbsd->nmbs", directions, directions)
    # A vector is like itself, but for rounding and a zero vector.
    return jnp.maximum(jax.nn.relu(cosines).sum(axis=1), 1.0)


def _last(model: Backbone, layers: Layer) -> Layer:
    return jax.tree.map(lambda leaf: leaf[model.num_layers - 1], layers)


def _require_one_stack(owner: Backbone | Params) -> None:
    require_one_stack(NAME, owner, "its form for two stacks has another encoder's output in the last layer")
