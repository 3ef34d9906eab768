"""The one training step: gradient, update, and the method's advance when it is due.

All training in peftjax (`fit`, `pj.plan`, the experiments, the conformance checks) runs this step.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from peftjax.core.checks import one_of
from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.losses import Batch, Objective
from peftjax.train.gradient import Loss, Metrics, Sums, gradient_of_batch, loss_of_batch
from peftjax.train.paging import OptimizerMemory, paged_in, paged_out
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.transform import Advance, Transform

Forward = Callable[..., Any]
"""`(params, batch, *, key=None) -> outputs`."""
Moved = dict[str, Any]
"""The fields of `Frozen` that a program returns anew, and may write over."""
ADVANCED = ("state",)
"""Those that an advance does."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainingState:
    """All that a training has between two steps: a pytree.

    Attributes:
        step: steps done.
        frozen: of the method.
        trainable: what is trained.
        opt_state: of the optimizer.
        key: of the training; the step with the number t, from 1, uses `fold_in(key, t)`.
    """

    step: int
    frozen: Frozen
    trainable: Trainable
    opt_state: Any
    key: Key[Array, ""]


@dataclass(frozen=True)
class Training:
    """The training of a method by a loss and an optimizer; `training` makes it.

    Attributes:
        method: the method.
        loss: of rewritten parameters and a batch.
        tx: `method.optimizer` of the given one.
        accumulation: the parts in which a batch is computed, one after the other.
        grad_norm: whether the metrics have the norm of the gradient.
        optimizer_memory: where the optimizer's state lies between steps.
    """

    method: Transform
    loss: Loss
    tx: optax.GradientTransformationExtraArgs
    accumulation: int = 1
    grad_norm: bool = False
    optimizer_memory: OptimizerMemory = "device"

    def start(self, key: Key[Array, ""], params: Params) -> TrainingState:
        """The state before the first step; `params` stay as they are.

        Args:
            key: for the method's `init` and the training.
            params: the model's parameters.

        Raises:
            PeftError: the method's options do not fit the parameters.
        """
        init_key, key = jax.random.split(key)
        frozen, trainable = self.method.init(init_key, params)
        if self.method.in_place:
            frozen = replace(frozen, params=_copied(frozen.params))
        return self._begun(frozen, trainable, key)

    def begin(self, frozen: Frozen, trainable: Trainable, key: Key[Array, ""]) -> TrainingState:
        """The state before the first step of a method that is initialized; what is given stays as it is."""
        moved, fixed = divided(frozen, self._written)
        return self._begun(_joined(_copied(moved), fixed), _copied(trainable), key)

    def _begun(self, frozen: Frozen, trainable: Trainable, key: Key[Array, ""]) -> TrainingState:
        frozen, trainable = self.close(frozen, trainable)
        # Copied, for an optimizer's state may share arrays with what it is the state of.
        opt_state = _copied(self.tx.init(self.method.begin(frozen, trainable)[1]))
        return TrainingState(0, frozen, trainable, paged_out(opt_state, self.optimizer_memory), key)

    def close(self, frozen: Frozen, trainable: Trainable) -> tuple[Frozen, Trainable]:
        """`method.close`, compiled; trainable, state and the base of a method in place are donated."""
        if self.method.placement is None:
            return frozen, trainable
        plan = jax.eval_shape(self.method.close, frozen, trainable)[0].plan
        frozen, trainable = self._close(frozen, trainable)
        return replace(frozen, plan=plan), trainable

    def _close(self, frozen: Frozen, trainable: Trainable) -> tuple[Frozen, Trainable]:
        """The same without what the method decides by it, of what has been closed before."""
        moved, fixed = divided(frozen, self._written)
        moved, trainable = self._closed(moved, fixed, trainable)
        return _joined(moved, fixed), trainable

    def step(self, state: TrainingState, batch: Batch) -> tuple[TrainingState, Metrics]:
        """One step on a batch, after what the method does before it.

        Args:
            state: its trainable, optimizer state and, where they change, the method's state and base are
                donated: use what is returned.
            batch: of any trees of arrays; with accumulation, their first axes divide into the parts.

        Returns:
            The new state; the loss, whatever else the loss sums up, and `grad_norm` where it is asked for.
        """
        state = self.advance(state, batch)
        moved, fixed = divided(state.frozen, self.moves)
        key = jax.random.fold_in(state.key, state.step + 1)
        trainable, opt_state, moved, metrics = self._stepped(
            state.trainable, state.opt_state, moved, fixed, batch, key
        )
        frozen = _joined(moved, fixed)
        if self.method.in_place:
            # A program of its own: within the step, a compiler copies each weight before it writes into it.
            frozen, trainable = self._close(frozen, trainable)
        return TrainingState(state.step + 1, frozen, trainable, opt_state, state.key), metrics

    def advance(self, state: TrainingState, batch: Batch) -> TrainingState:
        """The method's advance before the next step, on that step's batch; part of `step`."""
        frozen = replace(state.frozen, advanced=True)
        for number, advance in enumerate(self.method.advances):
            for part in range(advance.parts(frozen)) if advance.due(state.step) else ():
                moved, fixed = divided(frozen, ADVANCED)
                # Not the key of the step itself.
                key = jax.random.fold_in(jax.random.fold_in(state.key, state.step + 1), 1)
                count = jnp.asarray(state.step, jnp.int32)
                trainable, opt_state, moved = self._advanced[number](
                    state.trainable, state.opt_state, moved, fixed, batch, count, key, part=part
                )
                frozen = _joined(moved, fixed)
                state = replace(state, trainable=trainable, opt_state=opt_state)
        return replace(state, frozen=frozen)

    def run_step(
        self,
        trainable: Trainable,
        opt_state: Any,
        moved: Moved,
        fixed: Frozen,
        batch: Batch,
        key: Key[Array, ""] | None,
    ) -> tuple[Trainable, Any, Moved, Metrics]:
        """What `step` compiles, with the first three donated; without a key nothing in it is random.

        Args:
            trainable: of the state.
            opt_state: of the state.
            moved: those fields of the state's `frozen` that the step writes over.
            fixed: `frozen` without them.
            batch: of the step.
            key: of the step.
        """
        frozen = _joined(moved, fixed)
        gradients, metrics = gradient_of_batch(
            self.method, self.loss, self.accumulation, trainable, frozen, batch, key
        )
        if self.grad_norm:
            metrics["grad_norm"] = optax.tree.norm(gradients)
        frozen, trainable = self.method.begin(frozen, trainable)
        opt_state = paged_in(opt_state, self.optimizer_memory)
        updates, opt_state = self.tx.update(gradients, opt_state, trainable, frozen=frozen)
        frozen, trainable = self.method.end(frozen, optax.apply_updates(trainable, updates))
        opt_state = paged_out(opt_state, self.optimizer_memory)
        return trainable, opt_state, {name: getattr(frozen, name) for name in moved}, metrics

    def run_advance(
        self,
        advance: Advance,
        trainable: Trainable,
        opt_state: Any,
        moved: Moved,
        fixed: Frozen,
        batch: Batch,
        step: Int[Array, ""],
        key: Key[Array, ""],
        *,
        part: int,
    ) -> tuple[Trainable, Any, Moved]:
        """What `advance` compiles for a part of one of the method's advances; arguments as of `run_step`."""
        frozen = _joined(moved, fixed)
        opt_state = paged_in(opt_state, self.optimizer_memory)
        optimizer = OptimizerState(opt_state, self.tx, self.method.begin(frozen, trainable)[1])
        frozen, trainable, optimizer = advance.run(
            loss_of_batch(self.loss, self.accumulation, batch),
            frozen,
            trainable,
            optimizer,
            step=step,
            key=key,
            part=part,
        )
        opt_state = paged_out(optimizer.state, self.optimizer_memory)
        return trainable, opt_state, {name: getattr(frozen, name) for name in moved}

    @property
    def moves(self) -> tuple[str, ...]:
        """The fields of `frozen` that a step's program changes."""
        placement = self.method.placement
        return () if placement is None or placement.stays_closed else ("state",)

    @property
    def _written(self) -> tuple[str, ...]:
        """The fields of `frozen` that closing it changes."""
        return ("state", "params") if self.method.in_place else ("state",)

    @cached_property
    def _stepped(self) -> Callable[..., tuple[Trainable, Any, Moved, Metrics]]:
        return jax.jit(self.run_step, donate_argnums=(0, 1, 2))

    @cached_property
    def _advanced(self) -> tuple[Callable[..., tuple[Trainable, Any, Moved]], ...]:
        return tuple(
            jax.jit(partial(self.run_advance, one), static_argnames="part", donate_argnums=(0, 1, 2))
            for one in self.method.advances
        )

    @cached_property
    def _closed(self) -> Callable[..., tuple[Moved, Trainable]]:
        def close(moved: Moved, fixed: Frozen, trainable: Trainable) -> tuple[Moved, Trainable]:
            frozen, trainable = self.method.close(_joined(moved, fixed), trainable)
            return {name: getattr(frozen, name) for name in moved}, trainable

        return jax.jit(close, donate_argnums=(0, 2))


def training(
    method: Transform,
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    grad_norm: bool = False,
    optimizer_memory: OptimizerMemory = "device",
) -> Training:
    """The training step of a method: compiled, its state donated, the method advanced when it is due.

        training = pj.training(method, loss, optax.adamw(2e-4))
        state = training.start(key, params)
        for batch in batches:
            state, metrics = training.step(state, batch)

    Only the trainable is differentiated. With `accumulation` A > 1 a batch is computed as A equal parts one
    after the other; the gradient is that of the whole batch's weighted mean. A batch of which nothing counts
    (every weight 0) is a step with gradients of zero, and metrics of zero.

    Args:
        method: the method.
        loss: `(params, batch) -> loss`, of the rewritten parameters, `pj.adapt(method.model(model))(params,
            ...)` inside: the mean over the batch, or sums by name with their weight. One that takes `key` too
            is given a key in each step, for the model's own dropout.
        tx: any optax optimizer.
        accumulation: A.
        grad_norm: report the norm of the gradient too, for which all of it is in memory at one time.
        optimizer_memory: where the optimizer's state lies between steps: on the device, or with "pinned_host"
            in the host's memory, from where each step brings it for the update. What is trained is the same.

    Raises:
        PeftError: when `accumulation` is not positive, or there is no such memory.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> loss = lambda params, x: jnp.mean(pj.adapt(jnp.dot)(x, params["up"]["kernel"]) ** 2)
        >>> training = pj.training(pj.lora(rank=2, targets=["up"]), loss, optax.adamw(1e-2))
        >>> state = training.start(jax.random.key(0), params)
        >>> state, metrics = training.step(state, jnp.ones((3, 4)))
        >>> int(state.step), float(metrics["loss"])
        (1, 16.0)
    """
    if accumulation < 1:
        raise PeftError(f"training: accumulation must be positive, got {accumulation}")
    one_of("training", "optimizer_memory", optimizer_memory, get_args(OptimizerMemory))
    return Training(method, loss, method.optimizer(tx), accumulation, grad_norm, optimizer_memory)


def model_loss(forward: Forward, objective: Objective, *, model_dropout: bool = False) -> Loss:
    """The loss of a model, as the method rewrites it, by an objective; with its own dropout or without."""
    forward = adapt(forward)

    def loss(params: Params, batch: Batch) -> Sums:
        return objective(forward(params, batch), batch)

    def with_dropout(params: Params, batch: Batch, key: Key[Array, ""] | None = None) -> Sums:
        return objective(forward(params, batch, key=key), batch)

    return with_dropout if model_dropout else loss


def divided(frozen: Frozen, names: Collection[str]) -> tuple[Moved, Frozen]:
    """Some fields of `frozen`, and `frozen` without them: `moved` and `fixed` of a program."""
    return {name: getattr(frozen, name) for name in names}, replace(frozen, **dict.fromkeys(names))


def _joined(moved: Moved, fixed: Frozen) -> Frozen:
    return replace(fixed, **moved)


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
