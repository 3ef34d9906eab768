"""Training one block after the other, each to give what it gave before the method changed it.

Paper: block-wise reconstruction of quantized models, Li et al., "BRECQ", ICLR 2021, arXiv 2102.05426; inputs
that are mixed number by number, Wei et al., "QDrop", ICLR 2022, arXiv 2203.05740.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Key

from peftjax.backbone.backbone import Backbone, Layer
from peftjax.backbone.context import Context
from peftjax.backbone.protocols import Batch, Params
from peftjax.backbone.rewriting import require_backbone, require_one_stack, require_scan
from peftjax.calibrate._blocks import cut, own_of
from peftjax.core.checks import at_least
from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.train.gradient import Sums
from peftjax.train.progress import Report, show_progress
from peftjax.train.step import Training, TrainingState, training
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.transform import Transform

_REPORTS = 10
"""How often the progress of a block is shown."""


class Reconstruction(NamedTuple):
    """A method whose blocks have been trained.

    Attributes:
        frozen: of the method.
        trainable: what it has trained.
        before: of each block, the error of its output as the method starts: the mean over the tokens of all
            batches of `|block(x) - target|²`, x being what the blocks before it give, which are trained.
        after: the same after its training; `before` where that made it larger.
    """

    frozen: Frozen
    trainable: Trainable
    before: tuple[float, ...]
    after: tuple[float, ...]


def reconstruct(
    method: Transform,
    model: Backbone,
    params: Params,
    batches: Iterable[Batch],
    tx: optax.GradientTransformation,
    *,
    steps: int,
    key: Key[Array, ""],
    input_prob: float = 0.5,
    like: Params | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Train what a method has in each block so that the block gives its output of before, first to last.

        min over θ_l of  mean_t |f_l(x; θ_l) - f_l(h)|²        h: what enters the block in the model as it was

    Each number of x is that of the trained blocks before it with probability `input_prob`, else h's. A block
    that its training has taken further away stays as it starts. No gradient leaves a block: memory is that of
    one block's training, and of four hidden states for each token of the batches. Tokens of padding do not
    count. Blocks share a compiled step.

    Args:
        method: of which each trained array belongs to a weight of the blocks, such as `flexround` or
            `quantized(train=True)`.
        model: a backbone of one stack of blocks, such as `pj.load` gives.
        params: the model's parameters.
        batches: what is calibrated on, all of it held; batches of one shape share a program.
        tx: the optimizer, which begins anew in each block: a schedule is of `steps`.
        steps: of each block, a batch each.
        key: for the method's start and the mixed inputs.
        input_prob: 1 trains on what the trained blocks give alone.
        like: the parameters of the model whose blocks are followed, such as those before it was pruned; by
            default `params`.
        progress: show it on stderr.

    Raises:
        PeftError: the model is no such backbone; the method trains a parameter outside the blocks, or none;
            there is no batch; an option is out of range.
    """
    at_least("reconstruct", "steps", steps, 1)
    if not 0 <= input_prob <= 1:
        raise PeftError(f"reconstruct: input_prob must be in [0, 1], got {input_prob!r}")
    backbone = require_backbone("reconstruct", model)
    require_one_stack("reconstruct", backbone, "its decoder's blocks read what all of its encoder gives")
    changed = require_backbone("reconstruct", method.model(backbone))
    require_scan("reconstruct", changed)
    start_key, key = jax.random.split(key)
    layers = _layers_of(method, params, start_key)
    train = training(method, _loss_of(changed, input_prob), tx)
    measure = jax.jit(_measure_of(method, changed))
    run = jax.jit(lambda params, one: _run(backbone, params, one["float"], one["context"], one["own"]))
    embed = jax.jit(lambda params, batch: _embedded(backbone, params, batch))
    followed = params if like is None else like
    streams = [embed({"embed": followed["embed"]}, dict(batch)) for batch in batches]
    if not streams:
        raise PeftError("reconstruct: there is no batch; give at least one")
    trained, before, after = [], [], []
    with show_progress(backbone.num_layers * steps, 0) if progress else nullcontext(_silent) as report:
        for number in range(backbone.num_layers):
            blocks, own = {"blocks": cut(followed["blocks"], number)}, own_of(backbone, number)
            streams = [{**one, "own": own} for one in streams]
            streams = [{**one, "target": run(blocks, one)} for one in streams]
            frozen, trainable = layers.part(number)
            started = [measure(frozen, trainable, one) for one in streams]
            state = train.begin(frozen, trainable, jax.random.fold_in(key, number))
            state = _trained(train, state, streams, steps, report, done=number * steps)
            ended = [measure(state.frozen, state.trainable, one) for one in streams]
            before.append(_mean(sums for _, sums in started))
            after.append(_mean(sums for _, sums in ended))
            better = after[-1] < before[-1]
            trained.append(state.trainable if better else trainable)
            after[-1] = min(before[-1], after[-1])
            outs = [out for out, _ in (ended if better else started)]
            streams = [{**one, "float": one["target"], "rounded": out} for one, out in zip(streams, outs)]
    return Reconstruction(layers.frozen, layers.whole(trained), tuple(before), tuple(after))


@dataclass(frozen=True)
class _Layers:
    """A method's parts on a stack of blocks, which it has for a stack of one too.

    Attributes:
        frozen: of the method.
        trainable: of the method.
        one: shapes of both for a stack of one block.
    """

    frozen: Frozen
    trainable: Trainable
    one: tuple[Frozen, Trainable]

    def part(self, number: int) -> tuple[Frozen, Trainable]:
        """Those of one block."""
        leaves, structure = jax.tree.leaves((self.frozen, self.trainable)), jax.tree.structure(self.one)
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.one)]
        stacked = [leaf for leaf, shape in zip(leaves, shapes, strict=True) if leaf.shape != shape]
        parts = iter(cut(stacked, number))
        of_block = [next(parts) if leaf.shape != shape else leaf for leaf, shape in zip(leaves, shapes)]
        return jax.tree.unflatten(structure, of_block)

    def whole(self, trained: list[Trainable]) -> Trainable:
        """What is trained of all blocks."""
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trained)


def _layers_of(method: Transform, params: Params, key: Key[Array, ""]) -> _Layers:
    frozen, trainable = method.init(key, params)
    first = jax.eval_shape(lambda blocks: cut(blocks, 0), params["blocks"])
    one = jax.eval_shape(method.init, key, {**params, "blocks": first})
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    if not paths:
        raise PeftError(f"reconstruct: {method.name} trains nothing")
    for path in paths:
        if "['blocks/" not in path:
            raise PeftError(f"reconstruct: {method.name} trains {path}, which is in no block; exclude it")
    return _Layers(frozen, trainable, one)


def _embedded(backbone: Backbone, params: Params, batch: Batch) -> dict[str, Any]:
    """What enters the first block, twice: of the model as it was, and of the trained one."""
    hidden, context = backbone.run_embed(params, batch)
    return {"float": hidden, "rounded": hidden, "context": context}


def _run(
    backbone: Backbone, params: Params, hidden: Array, context: Context, own: Mapping[str, Any]
) -> Array:
    """The output of the only block of a stack."""
    weights = jax.tree.map(lambda leaf: lax.index_in_dim(leaf, 0, keepdims=False), params["blocks"])
    return backbone.run_layer(Layer(weights, dict(own), None), hidden, context)


def _error(out: Array, one: Mapping[str, Any]) -> Sums:
    """`Σ|out - target|²` over the tokens, and how many there are."""
    error = jnp.sum((out.astype(jnp.float32) - one["target"].astype(jnp.float32)) ** 2, -1)
    mask = one["context"].mask
    counts = (
        jnp.ones(error.shape) if mask is None else jnp.broadcast_to(mask, error.shape).astype(jnp.float32)
    )
    return {"loss": jnp.sum(error * counts)}, jnp.sum(counts)


def _loss_of(backbone: Backbone, input_prob: float) -> Callable[..., Sums]:
    """The loss of a block on inputs that are mixed."""

    def loss(params: Params, one: Mapping[str, Any], key: Key[Array, ""] | None = None) -> Sums:
        hidden = one["rounded"]
        if key is not None and input_prob < 1:
            hidden = jnp.where(jax.random.bernoulli(key, input_prob, hidden.shape), hidden, one["float"])

        def run(params: Params, hidden: Array) -> Array:
            return _run(backbone, params, hidden, one["context"], one["own"])

        return _error(adapt(run)(params, hidden), one)

    return loss


def _measure_of(method: Transform, backbone: Backbone) -> Callable[..., tuple[Array, Sums]]:
    """A block's output on what the blocks before it give, and its error."""

    def measure(frozen: Frozen, trainable: Trainable, one: Mapping[str, Any]) -> tuple[Array, Sums]:
        def run(params: Params, hidden: Array) -> Array:
            return _run(backbone, params, hidden, one["context"], one["own"])

        out = adapt(run)(method.apply(frozen, trainable), one["rounded"])
        return out, _error(out, one)

    return measure


def _trained(
    train: Training,
    state: TrainingState,
    streams: list[dict[str, Any]],
    steps: int,
    report: Report,
    *,
    done: int,
) -> TrainingState:
    """The state of a block after its steps, `done` having been made in others."""
    every = max(1, steps // _REPORTS)
    for step in range(steps):
        state, metrics = train.step(state, streams[step % len(streams)])
        if (step + 1) % every == 0 or step + 1 == steps:
            report(done + step + 1, {"loss": float(metrics["loss"])})
    return state


def _silent(step: int, values: Mapping[str, float | int | None]) -> None:
    """Show nothing."""


def _mean(sums: Iterable[Sums]) -> float:
    """The mean error over all batches."""
    found = [(float(total["loss"]), float(count)) for total, count in sums]
    return sum(total for total, _ in found) / max(1.0, sum(count for _, count in found))
