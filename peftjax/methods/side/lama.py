"""LAMA: m attention distributions over the tokens, from one context vector, and a classifier over them.

Paper: Mehta et al., "Low Rank Factorization for Compact Multi-Head Self-Attention", 2019, arXiv 1912.00835.
Of what a model's last block gives, H [B, S, D]:

    e[h, t] = tanh((Pᵀc)_h · (Qᵀ H_t)_h)      P, Q [D, m]: of head h the affinity p_h q_hᵀ, of rank 1
    e[:, t] ← e[:, t] / ‖e[:, t]‖              c [D] the mean of the visible H_t, or trained
    A = softmax_t(e), over visible tokens      R = A·H [B, m, D]      logits = flatten(R)·W + b, W [m·D, C]

It takes the place of the classifier, and of what that reads. Trained: 2 m D + (m D + 1) C numbers, and c's D;
what is trained in the blocks is up to the methods that it is chained with. Backward keeps H and m numbers a
token. P and Q are uniform, ±1/√D, a trained c ~ N(0, 1).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from peftjax.backbone.context import Context
from peftjax.backbone.functional import linear, linear_init, uniform_init
from peftjax.backbone.protocols import Params
from peftjax.backbone.rewriting import require_backbone
from peftjax.backbone.rewritten import RewrittenModule
from peftjax.core import tree
from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform

NAME = "lama"
_TINY = 1e-24
NEEDS_A_CLASSIFIER = (
    "lama takes the place of a model's classifier, and this model has none; load it with head='classifier'"
)


@register(
    kind="adapter",
    paper="low-rank multi-head attention pooling, Mehta et al. 2019, arXiv 1912.00835",
    trains="2 m D, and (m D + 1) C",
    backward_keeps="m numbers a token, and what the last block gives",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"heads": 2}, starts_as_base=False, reads_classifier=True),
)
def lama(
    *, heads: int = 8, context: Literal["mean", "trained"] = "mean", normalize: bool = True
) -> Transform:
    """A classifier over several weighted means of the tokens (arXiv 1912.00835).

    Args:
        heads: m.
        context: c: the 'mean' of a row's tokens, or 'trained', one for all.
        normalize: give the m scores of each token the norm 1.

    Raises:
        PeftError: for an option out of range; in `init` and `model`, for what is not a backbone with a
            classifier.
    """
    positive(NAME, "heads", heads)
    one_of(NAME, "context", context, ("mean", "trained"))

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        kernel = tree.named_leaves(params.get("head", {})).get("classifier/kernel")
        if kernel is None:
            raise PeftError(NEEDS_A_CLASSIFIER)
        width, classes = kernel.shape
        keys = jax.random.split(key, 4)
        own = {"context": jax.random.normal(keys[0], (width,))} if context == "trained" else {}
        return Frozen(params), {
            **own,
            "left": uniform_init(keys[1], (width, heads)),
            "right": uniform_init(keys[2], (width, heads)),
            "classifier": linear_init(keys[3], (heads * width, classes)),
        }

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        return {**frozen.params, "head": {**frozen.params["head"], NAME: trainable}}

    def model(forward: Forward) -> Forward:
        backbone = require_backbone(NAME, forward)
        if "classifier" not in backbone.head_name:
            raise PeftError(NEEDS_A_CLASSIFIER)
        return dataclasses.replace(backbone, head=PoolingHead(backbone.head, NAME, normalize))

    return Transform(NAME, {}, init, apply, model)


@dataclasses.dataclass(frozen=True)
class PoolingHead(RewrittenModule):
    """The head that pools, beside the model's own, which is not run.

    Attributes:
        inner: the model's own head.
        added_as: the name of the method's parameters beside the head's.
        normalize: the scores of each token.
    """

    added_as: str
    normalize: bool

    def apply(
        self, variables: Any, hidden: Float[Array, "B S D"], context: Context, embed: Params, **options: Any
    ) -> Float[Array, "B C"]:
        """The logits."""
        own = variables["params"][self.added_as]
        weights = attention(own, hidden, context.mask, normalize=self.normalize).astype(hidden.dtype)
        pooled = jnp.einsum("bms,bsd->bmd", weights, hidden)
        return linear(own["classifier"], pooled.reshape(len(pooled), -1))


def attention(
    own: Params, hidden: Float[Array, "B S D"], mask: Bool[Array, "B S"] | None, *, normalize: bool
) -> Float[Array, "B m S"]:
    """A, float32: rows that sum to one over the tokens that are visible."""
    context = own["context"] if "context" in own else _mean(hidden, mask)
    query = context @ own["left"]  # the m numbers Pᵀc, all that is needed of both
    keys = hidden @ own["right"].astype(hidden.dtype)
    scores = jnp.tanh(query * keys.astype(jnp.float32)).swapaxes(-1, -2)
    if normalize:
        squares = jnp.square(scores).sum(axis=-2, keepdims=True)
        scores = scores * lax.rsqrt(jnp.maximum(squares, _TINY))
    if mask is not None:
        scores = jnp.where(mask[:, None, :], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _mean(hidden: Float[Array, "B S D"], mask: Bool[Array, "B S"] | None) -> Float[Array, "B 1 D"]:
    """The mean of the tokens that are visible, float32."""
    wide = hidden.astype(jnp.float32)
    if mask is None:
        return wide.mean(axis=1, keepdims=True)
    counted = mask[..., None].astype(jnp.float32)
    return (counted * wide).sum(axis=1, keepdims=True) / jnp.maximum(counted.sum(axis=1, keepdims=True), 1.0)
