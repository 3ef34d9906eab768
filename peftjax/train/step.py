"""One training step and one evaluation, as jitted functions of `trainable` and `frozen`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.losses import Batch, Objective, mean
from peftjax.transform.transform import Renewal, Transform

Forward = Callable[..., Any]
"""`(params, batch, *, key=None) -> outputs`."""
Metrics = dict[str, Float[Array, ""]]
Step = Callable[[PyTree, PyTree, PyTree, Batch, Key[Array, ""]], tuple[PyTree[Array], PyTree[Array], Metrics]]
"""`(trainable, opt_state, frozen, batch, key) -> (trainable, opt_state, metrics)`."""
Write = Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]]
"""`(frozen, trainable) -> frozen`, the base with what has been trained."""


@dataclass(frozen=True)
class Renew:
    """What is done between two steps.

    Attributes:
        due: `step -> bool`, for the step that follows, counted from 0.
        run: `(trainable, opt_state, frozen, batch, step, key) -> (trainable, opt_state)`, all its parts.
        program: the jitted part, `part` its last argument.
    """

    due: Callable[[int], bool]
    run: Callable[..., tuple[PyTree[Array], PyTree[Array]]]
    program: Callable[..., tuple[PyTree[Array], PyTree[Array]]]


Evaluate = Callable[[PyTree[Array], PyTree[Array], Iterable[Batch]], dict[str, float]]
"""`(trainable, frozen, batches) -> means over all examples`."""


def make_step(
    forward: Forward,
    method: Transform,
    tx: optax.GradientTransformation,
    objective: Objective,
    *,
    accumulation: int = 1,
    model_dropout: bool = False,
) -> Step:
    """The jitted training step.

    With `accumulation` A > 1 the batch is computed as A equal parts one after the other; the
    gradient is that of the whole batch's weighted mean, also where parts weigh differently. A batch
    of which nothing counts (every weight 0) is a step with gradients of zero, and metrics of zero.

    The key drives the method's randomness (adapter dropout) and, with `model_dropout`, the model's.

    Only `trainable` is differentiated. `trainable` and `opt_state` are donated: use what is
    returned. `metrics` has the objective's means, with `loss`, and `grad_norm`.
    """

    def mean_loss(
        trainable: PyTree, frozen: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Array, tuple[Metrics, Array]]:
        method_key, model_key = jax.random.split(key)
        params = method.apply(frozen, trainable, key=method_key)
        outputs = adapt(forward)(params, batch, key=model_key if model_dropout else None)
        sums, weight = objective(outputs, batch)
        # The mean, not the sum: what a method adds to the gradient itself (a penalty) is not of the batch.
        return mean(sums["loss"], weight), (sums, weight)

    def gradient(
        trainable: PyTree, frozen: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[list[Array], Metrics, Array]:
        # Here and not before the parts of a batch: zeros that are carried through their loop take memory.
        moving, whole = _moving(method, method.open(frozen, trainable))

        def of_moving(moving: list[Array]) -> tuple[Array, tuple[Metrics, Array]]:
            return mean_loss(whole(moving, lambda leaf: leaf), frozen, batch, key)

        gradients, (sums, weight) = jax.grad(of_moving, has_aux=True)(moving)
        # Where nothing counts, neither does a penalty, as in a sum over parts of a batch.
        gradients = jax.tree.map(lambda leaf: jnp.where(weight > 0, leaf, jnp.zeros_like(leaf)), gradients)
        return gradients, sums, weight

    def accumulated(
        trainable: PyTree, frozen: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[list[Array], Metrics, Array]:
        parts = _parts(batch, accumulation)
        first = jax.eval_shape(gradient, trainable, frozen, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

        def add(total: PyTree, part: tuple[Batch, Key[Array, ""]]) -> tuple[PyTree, None]:
            gradients, sums, weight = gradient(trainable, frozen, *part)
            weighted = _times(gradients, weight)
            return jax.tree.map(jnp.add, total, (weighted, sums, weight)), None

        total, sums, weight = jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulation)))[0]
        return _times(total, mean(jnp.ones_like(weight), weight)), sums, weight

    def step(
        trainable: PyTree, opt_state: PyTree, frozen: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[PyTree, PyTree, Metrics]:
        compute = gradient if accumulation == 1 else accumulated
        gradients, sums, weight = compute(trainable, frozen, batch, key)
        metrics = {name: mean(total, weight) for name, total in sums.items()}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        trainable = method.open(frozen, trainable)
        gradients = _moving(method, trainable)[1](gradients, jnp.zeros_like)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return method.close(frozen, optax.apply_updates(trainable, updates)), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def _moving(
    method: Transform, trainable: PyTree
) -> tuple[list[Array], Callable[[list[Array], Callable[[Array], Array]], PyTree]]:
    """The leaves that have a gradient; and what puts such leaves beside `other(leaf)` of all others.

    So what the method's own hooks set (a whole base, pools) is neither differentiated nor accumulated.
    """
    leaves, structure = jax.tree.flatten(trainable)
    moves = structure.flatten_up_to(method.moving(trainable))

    def whole(moving: list[Array], other: Callable[[Array], Array]) -> PyTree:
        given = iter(moving)
        return structure.unflatten(next(given) if m else other(leaf) for m, leaf in zip(moves, leaves))

    return [leaf for m, leaf in zip(moves, leaves) if m], whole


def make_renewals(
    forward: Forward, method: Transform, objective: Objective, *, accumulation: int = 1
) -> tuple[Renew, ...]:
    """What the method does between steps, jitted.

    It is given the batch of the step that follows, whose mean loss it may differentiate; with
    `accumulation` its parts are computed one after the other, and again in the backward pass. Neither the
    model's nor an adapter's dropout acts in it. `trainable` and `opt_state` are donated.
    """

    def jitted(renewal: Renewal) -> Renew:
        @partial(jax.jit, static_argnames="part", donate_argnums=(0, 1))
        def run(
            trainable: PyTree,
            opt_state: PyTree,
            frozen: PyTree,
            batch: Batch,
            step: Int[Array, ""],
            key: Key[Array, ""],
            part: int,
        ) -> tuple[PyTree, PyTree]:
            loss = _loss_of(forward, objective, batch, accumulation)
            return renewal.run(loss, frozen, trainable, opt_state, step=step, key=key, part=part)

        def renew(
            trainable: PyTree,
            opt_state: PyTree,
            frozen: PyTree,
            batch: Batch,
            step: Int[Array, ""],
            key: Key[Array, ""],
        ) -> tuple[PyTree, PyTree]:
            for part in range(renewal.parts(frozen)):
                trainable, opt_state = run(trainable, opt_state, frozen, batch, step, key, part)
            return trainable, opt_state

        return Renew(renewal.due, renew, run)

    return tuple(jitted(renewal) for renewal in method.renewals)


def _loss_of(
    forward: Forward, objective: Objective, batch: Batch, accumulation: int
) -> Callable[[PyTree], Float[Array, ""]]:
    """`params -> mean loss of the batch`, computed in as many parts as a step's."""

    def sums(params: PyTree, batch: Batch) -> tuple[Array, Array]:
        sums, weight = objective(adapt(forward)(params, batch), batch)
        return sums["loss"], weight

    def loss(params: PyTree) -> Array:
        if accumulation == 1:
            total, weight = sums(params, batch)
        else:
            of_part = jax.checkpoint(lambda part: sums(params, part))
            losses, weights = jax.lax.map(of_part, _parts(batch, accumulation))
            total, weight = jnp.sum(losses), jnp.sum(weights)
        return mean(total, weight)

    return loss


def make_write(method: Transform) -> Write:
    """The line that follows a step of an in-place method, jitted; `frozen` is donated."""
    return jax.jit(method.write, donate_argnums=0)


def _parts(batch: Batch, accumulation: int) -> dict[str, Array]:
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), dict(batch))


def _times(gradients: PyTree[Array], factor: Array) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradients)


def make_evaluate(forward: Forward, method: Transform, objective: Objective) -> Evaluate:
    """Evaluation without dropout: the objective's means, every example counted once by weight.

    The function raises a PeftError when no example counts.
    """

    @jax.jit
    def sums_of(trainable: PyTree, frozen: PyTree, batch: Batch) -> tuple[Metrics, Array]:
        return objective(adapt(forward)(method.apply(frozen, trainable), batch), batch)

    def evaluate(trainable: PyTree, frozen: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
        totals, weights = {}, 0.0
        for batch in batches:
            sums, weight = jax.device_get(sums_of(trainable, frozen, batch))
            weights += float(weight)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        if not weights > 0:
            raise PeftError(
                "no example of the evaluation counts: there is no batch, or every weight in them is 0"
            )
        return {name: total / weights for name, total in totals.items()}

    return evaluate
