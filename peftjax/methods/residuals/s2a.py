"""S2A-style tuning: biases and side modules, which need no large activation, on blocks that keep 4-bit codes.

Jin et al. 2025, arXiv 2503.08154 ("S2A", under several titles). No code is published, and no more than the
abstract's idea is followed here: tune what needs little of the activations, and keep the rest in 4 bits.

    bias    b trained; db = Σ over tokens of g: nothing is kept. A norm's shift is one; its scale stays frozen
    prompt  P trained tokens after a row's own, in an encoder: see `_prompt_tokens`
    side    u = pool(sg(h)),   h + attention(h) + Up(f(Down(u)))     Down: D -> d,  Up: d -> D, zero at first
    blocks  as with `coded_residuals`

Trained: the biases but those of keys, 2 D d + d + D numbers a layer, and P D. Backward keeps D / pool values
of u and d / pool more a token and layer, and the codes of the blocks. With biases alone the result merges.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.context import Context
from peftjax.backbone.rewriting import add_to_blocks, require_one_stack, rewrite_stacks, stacks_of
from peftjax.backbone.rewritten import RewrittenBlock
from peftjax.core import tree
from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.methods._targets import key_for
from peftjax.methods.bottleneck._bottleneck import Bottleneck
from peftjax.methods.prompt._prompt_tokens import init_prompts, with_prompts
from peftjax.methods.residuals.coded_residuals import with_codes
from peftjax.ops.coded.bits import Bits
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform
from peftjax.weights.base import Weight


@dataclasses.dataclass(frozen=True)
class SideBlock(RewrittenBlock):
    """A block with a side module, whose parameters are `added`.

    Attributes:
        side: Down, f and Up.
        pool: how many tokens are read as one.
    """

    side: Bottleneck | None = None
    pool: int = 1

    def attention_sublayer(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """The stream after attention and the side module, both of which read the block's input."""
        assert self.side is not None
        pooled = pool_tokens(jax.lax.stop_gradient(hidden), context.mask, self.pool)
        beside = jnp.repeat(self.side.run(self.added, pooled), self.pool, axis=1)[:, : hidden.shape[1]]
        return super().attention_sublayer(hidden, context) + beside


def pool_tokens(hidden: Float[Array, "B S D"], mask: Array | None, pool: int) -> Float[Array, "B P D"]:
    """The mean of every `pool` tokens in a row, of those where `mask` [B, S] is True; 0 where none is."""
    if pool == 1:
        return hidden
    batch, length, width = hidden.shape
    seen = jnp.ones((batch, length), bool) if mask is None else mask
    hidden = jnp.where(seen[..., None], hidden, 0)
    missing = -length % pool
    hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0))).reshape(batch, -1, pool, width)
    count = jnp.pad(seen, ((0, 0), (0, missing))).reshape(batch, -1, pool).sum(-1)
    total = hidden.sum(2, dtype=jnp.float32)
    return (total / jnp.maximum(count, 1)[..., None]).astype(hidden.dtype)


@register(
    kind="adapter",
    paper="S2A-style, Jin et al. 2025, arXiv 2503.08154",
    trains="the biases, 2 D d + d + D a layer, and P D of prompts",
    backward_keeps="codes of 4 or 8 bits; (D + d) / pool values a token for a side module",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"side": 2}),
)
def s2a(
    *,
    biases: bool = True,
    prompts: int = 0,
    side: int = 16,
    pool: int = 2,
    activation: str = "relu",
    residuals: Mapping[str, int] | None = None,
) -> Transform:
    """Train biases and a side module in each block, whose residuals are codes (after arXiv 2503.08154).

    Args:
        biases: whether every parameter called 'bias' is trained, but those of keys, which have no effect
            without rotary positions.
        prompts: P, tokens after each row's; encoders only. A fresh one changes the outputs.
        side: d, the width of the side modules; 0 is none.
        pool: how many tokens a side module reads as one, except in a causal stack.
        activation: of the side modules, as of `pfeiffer`.
        residuals: options of `coded_residuals`.

    Raises:
        PeftError: for a setting out of range; in `init`, when nothing is left to train, or a bias is a
            structured weight; in `init` and `model`, when it is not a backbone's.
    """
    at_least("s2a", "prompts", prompts, 0)
    at_least("s2a", "side", side, 0)
    positive("s2a", "pool", pool)
    bottleneck = Bottleneck(side, activation=activation) if side else None
    if bottleneck is not None:
        bottleneck.require_valid("s2a")
    bits = _bits(residuals or {})

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        stacks = stacks_of("s2a", params)
        paths = _biases(params) if biases else []
        if not paths and not side and not prompts:
            raise PeftError("s2a: this model has no bias to train; give side=16 for side modules")
        taken, rest = tree.partition(params, paths)
        trainable: dict[str, Any] = {"biases": taken} if paths else {}
        for stack in stacks if bottleneck else ():
            own_key = key_for(key, f"{stack.name}/side")
            trainable[stack.name] = bottleneck.init(own_key, stack.num_layers, stack.width)
        if prompts:
            require_one_stack("s2a", params, "its two stacks have no common row of tokens for prompts")
            trainable["prompts"] = init_prompts(key_for(key, "prompts"), prompts, stacks[0].width)
        return Frozen(rest), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        params = tree.join(frozen.params, trainable.get("biases", {}))
        if prompts:
            params = {**params, "s2a": {"prompts": trainable["prompts"]}}
        added = {name: trainable[name] for name in ("blocks", "encoder") if name in trainable}
        return add_to_blocks("s2a", params, added) if added else params

    def model(forward: Forward) -> Forward:
        def rewrite(backbone: Backbone) -> Backbone:
            own_pool = 1 if backbone.block.config.causal else pool
            return dataclasses.replace(backbone, block=SideBlock(backbone.block, "s2a", bottleneck, own_pool))

        coded = with_codes("s2a", forward, bits)
        coded = with_prompts("s2a", coded) if prompts else coded
        return rewrite_stacks("s2a", coded, rewrite) if bottleneck else coded

    return Transform("s2a", {}, init, apply, model)


def _bits(residuals: Mapping[str, int]) -> Bits:
    unknown = set(residuals) - {field.name for field in dataclasses.fields(Bits)}
    if unknown:
        names = ", ".join(field.name for field in dataclasses.fields(Bits))
        raise PeftError(f"s2a: residuals has no {sorted(unknown)[0]!r}; it has {names}")
    return Bits(**residuals)


def _biases(params: Params) -> list[str]:
    """The paths of the biases that are still there to be trained.

    Without rotary positions a key's bias shifts all scores of a row alike: its gradient is only rounding.
    """
    paths = []
    for path, leaf in tree.named_leaves(params).items():
        if not path.endswith("bias") or path.endswith("key/bias") or isinstance(leaf, tree.Hole):
            continue
        if isinstance(leaf, Weight):
            raise PeftError(f"s2a: {path!r} is already a {type(leaf).__name__}; exclude it from that method")
        paths.append(path)
    return paths
