"""What a fine-tuning method is: a rewrite of the parameters, the model and the optimizer."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.weights.base import Weight, dense

Params = Any
Trainable = Any
Forward = Callable[..., Any]
Check = Callable[..., str | None]
"""`(method, model, frozen, trainable, batch, loss) -> a warning or None`, with `loss(outputs, batch)`."""


@dataclass(frozen=True)
class Renewal:
    """What a method does between two steps of a run, as a compiled program of its own.

    Attributes:
        due: `step -> bool`, asked before the step with that number, counted from 0.
        run: `(loss, frozen, trainable, opt_state, *, step, key, part=0, prefix=()) -> (trainable,
            opt_state)`, to be jitted with the last two donated; `loss: params -> scalar` is that of the
            step's batch, `step` an integer array, `part` static, `prefix` the path of this method's
            trainable inside a chain's.
        parts: `frozen -> how many parts` it has, each a program of its own to be run in turn, so that the
            memory of one is free for the next.
    """

    due: Callable[[int], bool]
    run: Callable[..., tuple[Trainable, Any]]
    parts: Callable[[Any], int] = lambda frozen: 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen:
    """What a method keeps fixed: a pytree to pass through `jit` beside the trainable.

    Attributes:
        params: the parameters, with a `Hole` where a plain leaf is trained.
        state: arrays of the method's own, by parameter path.
        plan: the method's static decisions (which leaf, which axes, which rank), hashable.
    """

    params: Params
    state: Any = field(default_factory=dict)
    plan: Any = field(default=(), metadata={"static": True})


def _keep_model(model: Forward) -> Forward:
    return model


def _keep_optimizer(
    tx: optax.GradientTransformation, prefix: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    return tx


def _keep_frozen(frozen: Frozen, trainable: Trainable | None) -> Frozen:
    return frozen


def _take_all(trained: Mapping[str, str]) -> None:
    pass


def _keep_trainable(frozen: Frozen, trainable: Trainable) -> Trainable:
    return trainable


def _all_move(trainable: Trainable) -> Any:
    return jax.tree.map(lambda _: True, trainable)


def _unshared(init: Callable[..., tuple[Frozen, Trainable]]) -> Callable[..., tuple[Frozen, Trainable]]:
    """`init` with a copy of each trained array that is one of the parameters, or there twice."""

    @functools.wraps(init)
    def copying(key: jax.Array, params: Params) -> tuple[Frozen, Trainable]:
        frozen, trainable = init(key, params)
        taken = {id(leaf) for leaf in jax.tree.leaves((params, frozen))}

        def own(leaf: Any) -> Any:
            shared = id(leaf) in taken
            taken.add(id(leaf))
            return jnp.copy(leaf) if shared and isinstance(leaf, jax.Array | np.ndarray) else leaf

        return frozen, jax.tree.map(own, trainable)

    return copying


@dataclass(frozen=True)
class Transform:
    """One method, as pure functions; nothing it is given is ever changed.

    Attributes:
        name: the method's name in the registry.
        config: the options it was made with; with the name, enough to make it again.
        init: `(key, params) -> (frozen, trainable)`; the trainable shares no array with `params` or
            `frozen`, so that a step may donate it.
        apply: `(frozen, trainable, key=None) -> params`, a tree that may hold structured weights; the
            key drives the randomness of training (adapter dropout), without it there is none.
        model: `forward -> forward`, a rewrite of the stack of blocks.
        optimizer: `optax transformation -> optax transformation` over the trainable; `prefix` is the
            path at which this method's trainable lies inside a chain's.
        write: `(frozen, trainable) -> frozen`, the trained values put into the weights they belong to;
            `write(frozen, None)` puts the original ones back, bit by bit. The identity for all but the
            methods made with `in_place=True` (see `in_place`).
        review: `({path: method}) -> None`, called by `chain` when all methods have begun with the parameters
            that are trained or adapted. It raises where another method's would get no gradient.
        checks: what a run asks before its first step, on rows of its first batch; of a chain, called with
            the whole chain.
        renewals: what is done between steps (a new projection, a restart), each when it is due.
        moving: `trainable -> truth values`, False at what has no gradient, because only the method's own
            hooks change it; a loop need not differentiate it.
        open: `(frozen, trainable) -> trainable`, what a step's program begins with: it adds the slots that a
            step needs and that no memory holds between steps.
        close: `(frozen, trainable) -> trainable`, what it ends with: they are put into the others, and gone.
            Both are the identity for all but the projected methods made with `write="step"`.
    """

    name: str
    config: Mapping[str, Any]
    init: Callable[[jax.Array, Params], tuple[Frozen, Trainable]]
    apply: Callable[..., Params]
    model: Callable[[Forward], Forward] = _keep_model
    optimizer: Callable[..., optax.GradientTransformation] = _keep_optimizer
    write: Callable[[Frozen, Trainable | None], Frozen] = _keep_frozen
    review: Callable[[Mapping[str, str]], None] = _take_all
    checks: tuple[Check, ...] = ()
    renewals: tuple[Renewal, ...] = ()
    moving: Callable[[Trainable], Any] = _all_move
    open: Callable[[Frozen, Trainable], Trainable] = _keep_trainable
    close: Callable[[Frozen, Trainable], Trainable] = _keep_trainable

    def __post_init__(self) -> None:
        object.__setattr__(self, "init", _unshared(self.init))

    @property
    def in_place(self) -> bool:
        """Whether the base may hold the adapted weights, so that a step needs no copy of any.

        From the first `write` on, `apply` takes the weights as they lie in `frozen`, and the loop has one
        line more: after each optimizer step, `frozen = write(frozen, trainable)`, jitted by itself with
        `frozen` donated. Without any `write`, `apply` is that of the same method not in place.
        """
        return self.write is not _keep_frozen

    def merge(self, frozen: Frozen, trainable: Trainable, *, safe: bool = False) -> Params:
        """Plain arrays of the structure and dtypes of the original parameters; `frozen` stays as it is.

        Weights of 16 bits are merged in float32 and rounded once.

        Args:
            frozen: from `init`, or from `write` with any trainable.
            trainable: the adapter.
            safe: check the result, outside `jit`.

        Raises:
            PeftError: the method adds parameters that no weight can hold; with `safe`, a merged parameter
                has a NaN or an infinity.
        """
        frozen = self.write(frozen, trainable)
        applied = self.apply(frozen, trainable)
        added = tree.named_leaves(applied).keys() - tree.named_leaves(frozen.params).keys()
        if added:
            raise PeftError(
                f"merge: {self.name} adds {min(added)!r}, which no weight of the model can hold; "
                "run the adapted model, method.model(model), instead"
            )
        merged = tree.map_named(lambda _, leaf: _merged(leaf), applied)
        if safe:
            for path, leaf in tree.named_leaves(merged).items():
                if not tree.is_array(leaf):
                    continue
                if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(leaf).all()):
                    raise PeftError(f"merge: parameter {path!r} has values that are not finite")
        return merged


def _merged(leaf: Any) -> jax.Array:
    """The array that a leaf stands for, in its dtype: a weight of 16 bits made in float32, rounded once."""
    if not isinstance(leaf, Weight) or jnp.dtype(leaf.dtype).itemsize >= 4:
        return dense(leaf)
    return dense(leaf.cast(jnp.float32)).astype(leaf.dtype)


def all_slots_but(names: Collection[str], trainable: Trainable) -> dict[str, dict[str, bool]]:
    """True at every slot `{path: {slot: ...}}` but those."""
    return {path: {slot: slot not in names for slot in slots} for path, slots in trainable.items()}


def at_prefix(updates: Any, prefix: tuple[str, ...], fn: Callable[[Any], Any]) -> Any:
    """`updates` with the weights `{path: {slot: ...}}` at `prefix` passed through `fn`.

    What optax has masked out of it (`optax.multi_transform`) stays, and is not shown to `fn`.
    """
    if isinstance(updates, optax.MaskedNode):
        return updates
    if not prefix:
        return {**updates, **fn(_unmasked(updates))}
    head, *rest = prefix
    return {**updates, head: at_prefix(updates[head], tuple(rest), fn)}


def own_at(tree: Any, prefix: tuple[str, ...]) -> dict[str, Any]:
    """The weights `{path: {slot: ...}}` at `prefix`, without those that optax has masked out."""
    for name in prefix:
        tree = {} if isinstance(tree, optax.MaskedNode) else tree[name]
    return {} if isinstance(tree, optax.MaskedNode) else _unmasked(tree)


def require_together(who: str, own: Mapping[str, Any]) -> None:
    """Raise a PeftError when an optimizer is given some slots of a weight and not the others."""
    for path, slots in own.items():
        here = [name for name, slot in slots.items() if not isinstance(slot, optax.MaskedNode)]
        if len(here) < len(slots):
            raise PeftError(
                f"{who}: of {path!r} this optimizer is given {', '.join(here)} and not "
                f"{', '.join(sorted(slots.keys() - set(here)))}; in optax.multi_transform or optax.masked, "
                "give all arrays of a weight the same label"
            )


def _unmasked(own: Mapping[str, Any]) -> dict[str, Any]:
    return {path: slots for path, slots in own.items() if jax.tree.leaves(slots)}
