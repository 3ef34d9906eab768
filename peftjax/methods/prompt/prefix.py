"""Prefix tuning: learned keys and values that every query of every attention sees (Li & Liang 2021).

arXiv 2101.00190. Per layer, K_p and V_p [P, K H]:

    h = softmax(q [K_p; K]ᵀ / √H) [V_p; V] = (1 − λ) h_base + λ softmax(q K_pᵀ / √H) V_p
    λ = Σ exp(q K_pᵀ / √H) / (Σ exp(q K_pᵀ / √H) + Σ exp(q Kᵀ / √H))

    [K_p; V_p] of layer l = tanh(E W + b) W_l + b_l        E [P, D], W [D, m], W_l [m, 2 K H]

With `mlp_size=None` keys and values are trained as they are; `without_mlp` makes that of the other. Trained:
P D + (D + 1) m + (m + 1) 2 L K H a kind of attention, or 2 L P K H. Backward keeps nothing a token, only P m
values of the MLP. A fresh prefix is not the base: even zero keys take their λ. It does not merge.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from peftjax.backbone.context import Context
from peftjax.backbone.functional import uniform_init
from peftjax.backbone.protocols import BlockModule
from peftjax.backbone.rewriting import BlockStack, require_backbone
from peftjax.backbone.rewritten import RewrittenBlock
from peftjax.core.checks import at_least, fraction, positive
from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.methods._parts import Layers, of_parts
from peftjax.methods._targets import key_for
from peftjax.transform.frozen import Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform
from peftjax.weights.dropout import drop


@register(
    kind="adapter",
    paper="prefix tuning, Li & Liang 2021, arXiv 2101.00190",
    trains="P D + (D + 1) m + (m + 1) 2 L K H; without the MLP 2 L P K H",
    backward_keeps="nothing a token",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"length": 3, "mlp_size": 4}, starts_as_base=False),
)
def prefix(
    *,
    length: int = 30,
    mlp_size: int | None = 512,
    init_std: float = 0.02,
    dropout: float = 0.0,
    layers: Layers = None,
) -> Transform:
    """Keys and values that every query sees, in every attention (arXiv 2101.00190); see the module.

    Args:
        length: P; the paper's is 10 for tables to text and 200 for summaries.
        mlp_size: m, the width of the MLP that gives them; None trains them as they are.
        init_std: their deviation at the start, without the MLP; 0 starts with zeros.
        dropout: rate on keys and values.
        layers: numbers of the layers to adapt; None is all.

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, when it is not a backbone's.
    """
    return of_parts("prefix", [Prefix(length, mlp_size, init_std, dropout)], layers)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The options of `prefix`."""

    length: int
    mlp_size: int | None
    init_std: float
    dropout: float

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for a setting out of range."""
        positive(caller, "the length of the prefix", self.length)
        positive(caller, "mlp_size", self.mlp_size)
        at_least(caller, "init_std", self.init_std, 0)
        fraction(caller, "the dropout of the prefix", self.dropout)

    def init(self, key: Key[Array, ""], stack: BlockStack) -> dict[str, Any]:
        """An MLP and its input, or keys and values, by the kind of attention."""
        keys = {branch: key_for(key, f"{stack.name}/{branch}/prefix") for branch in stack.attentions}
        return {"prefix": {branch: self._of_branch(own, stack) for branch, own in keys.items()}}

    def _of_branch(self, key: Key[Array, ""], stack: BlockStack) -> dict[str, Any]:
        layers, width, size = len(stack.layers), stack.key_width, self.mlp_size
        if size is None:
            shape = (layers, self.length, width)
            names = ("keys", "values")
            return {
                n: self.init_std * jax.random.normal(k, shape) for n, k in zip(names, jax.random.split(key))
            }
        first, second, third = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(first, (self.length, stack.width)),
            "inner": {"kernel": uniform_init(second, (stack.width, size)), "bias": jnp.zeros(size)},
            "output": {
                "kernel": uniform_init(third, (layers, size, 2 * width)),
                "bias": jnp.zeros((layers, 2 * width)),
            },
        }

    def added(self, trained: Any, stack: BlockStack, key: Key[Array, ""] | None) -> dict[str, Any]:
        """`keys` and `values` [layers, P, K H] by the kind of attention, `seen` where layers are left out."""
        added = {}
        for branch, values in trained["prefix"].items():
            own = keys_and_values(values)
            if key is not None and self.dropout:
                own_key = key_for(key, f"{branch}/prefix")
                dropped = drop(jnp.stack([own["keys"], own["values"]]), self.dropout, own_key)
                own = {"keys": dropped[0], "values": dropped[1]}
            if len(stack.layers) < stack.num_layers:
                own["seen"] = jnp.ones(own["keys"].shape[:2], bool)
            added[branch] = own
        return {"prefix": added}

    def rewrite(self, block: BlockModule, name: str) -> RewrittenBlock:
        """The block whose attentions see it."""
        return PrefixBlock(block, name)


def keys_and_values(trained: Mapping[str, Any]) -> dict[str, Array]:
    """The `keys` and `values` [layers, P, K H] from the trainable of one kind of attention."""
    if "embedding" not in trained:
        return dict(trained)
    inner, output = trained["inner"], trained["output"]
    hidden = jnp.tanh(trained["embedding"] @ inner["kernel"] + inner["bias"])
    both = jnp.einsum("pm,lmk->lpk", hidden, output["kernel"]) + output["bias"][:, None]
    keys, values = jnp.split(both, 2, axis=-1)
    return {"keys": keys, "values": values}


@dataclasses.dataclass(frozen=True)
class PrefixBlock(RewrittenBlock):
    """A block whose attentions see the keys and values of `added["prefix"][branch]`."""

    def attention_branch(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """What attention with a prefix adds to the stream."""
        return self.inner.attention_branch(hidden, self._with_prefix("attention", context))

    def cross_attention_branch(
        self, hidden: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B T D"]:
        """What cross-attention with a prefix adds to the stream."""
        return self.inner.cross_attention_branch(hidden, self._with_prefix("cross_attention", context))

    def _with_prefix(self, branch: str, context: Context) -> Context:
        own = self.added["prefix"][branch]
        if context.prefix is not None:  # of a method around this one
            both = [{"seen": jnp.ones(len(one["keys"]), bool), **one} for one in (context.prefix, own)]
            own = {name: jnp.concatenate([one[name] for one in both]) for name in both[0]}
        return dataclasses.replace(context, prefix=own)


def prefix_of(model: Forward, params: Params, tokens: Int[Array, " P"]) -> Trainable:
    """The trainable of `prefix(length=P, mlp_size=None)` with which the model runs as after these tokens.

    The keys are those at the places -P ... -1, so that the tokens that see them may begin at 0: a start for
    training. With a window, or a rotation that depends on the length, it is that only nearly.

    Args:
        model: a decoder with rotary positions.
        params: its parameters, structured weights among them.
        tokens: int32, at least one.

    Raises:
        PeftError: the model is not such a decoder, or there is no token.
    """
    backbone = require_backbone("prefix_of", model)
    if getattr(backbone.config, "rope", None) is None:
        raise PeftError("prefix_of: places before the first need rotary positions, and the model has none")
    length = len(tokens)
    if not length:
        raise PeftError("prefix_of: there is no token to take keys and values of")

    def read(params: Params, tokens: Array) -> Any:
        places = jnp.arange(-length, 0)[None]
        hidden, context = backbone.run_embed(params, {"input_ids": tokens, "position_ids": places})
        context = dataclasses.replace(context, mask=jnp.ones((1, length), bool), cache_index=0)
        cache = backbone.empty_cache(params, hidden, context)
        return backbone.run_blocks_cached(params, hidden, context, cache)[1]["attention"]

    cache = adapt(read)(params, jnp.asarray(tokens, jnp.int32)[None])
    # [L, 1, K, P, H] to [L, P, K H]
    flat = {name: jnp.moveaxis(slots[:, 0], 1, 2) for name, slots in cache.items()}
    flat = {name: slots.reshape(*slots.shape[:2], -1).astype(jnp.float32) for name, slots in flat.items()}
    return {"blocks": {"prefix": {"attention": flat}}}
