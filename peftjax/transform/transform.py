"""What a fine-tuning method is: a rewrite of the parameters, the model and the optimizer."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.transform.around import Around, put_around
from peftjax.transform.frozen import Frozen, Params, State, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.weights.base import Weight, dense
from peftjax.weights.coding import Coding
from peftjax.weights.quantized import Quantized
from peftjax.weights.requantized import RoundingError, coded_base, requantized

Forward = Callable[..., Any]
Loss = Callable[[Params], jax.Array]
"""`params -> scalar`, of the batch at hand."""
Check = Callable[..., str | None]
"""`(method, model, frozen, trainable, batch, loss) -> a warning or None`, with `loss(outputs, batch)`."""
Both = tuple[Frozen, Trainable]


@dataclass(frozen=True)
class Advance:
    """One thing that a method does to itself before a step: a refresh of its projection, an exchange of rows.

    Attributes:
        due: `step -> bool`, asked before the step with that number, counted from 0.
        run: `(loss, frozen, trainable, optimizer, *, step, key, part) -> (frozen, trainable, optimizer)`,
            pure; `loss: params -> scalar` is that of the step's batch, `optimizer` an `OptimizerState`,
            `step` an integer array, `part` static. Of `frozen` it changes those arrays alone that `changes`
            names.
        changes: the names of the arrays in `frozen.state[path]` that it changes; a checkpoint has them.
        parts: `frozen -> how many parts` it has, each a program of its own to be run in turn, so that the
            memory of one is free for the next.
    """

    due: Callable[[int], bool]
    run: Callable[..., tuple[Frozen, Trainable, OptimizerState]]
    changes: Collection[str] = ()
    parts: Callable[[Frozen], int] = lambda frozen: 1


@dataclass(frozen=True)
class Placement:
    """Where the trained values lie between steps, for a method that does not keep them beside the base.

    Attributes:
        close: `(frozen, trainable) -> (frozen, trainable)`, the trained values put into the base. What
            `trainable` need not hold then, it does not.
        open: the inverse, the values beside the base, which is bit for bit as it was.
        stays_closed: whether a step trains the values in the base. Else a step begins with `open`.
    """

    open: Callable[[Frozen, Trainable], Both]
    close: Callable[[Frozen, Trainable], Both]
    stays_closed: bool


@dataclass(frozen=True)
class GradientCut:
    """The base's parameters get no gradient beside this method, but for those whose names begin so.

    Attributes:
        spared: how their names begin.
        remedy: what else to do than to leave a parameter out.
    """

    remedy: str
    spared: str = "head/"


@dataclass(frozen=True)
class Transform:
    """One method, as pure functions; nothing it is given is ever changed.

    Attributes:
        name: the method's name in the registry.
        config: the options it was made with; with the name, enough to make the same one.
        init: `(key, params) -> (frozen, trainable)`; neither the trainable nor the method's state shares an
            array with `params`, so that a step may donate them.
        apply: `(frozen, trainable, key=None) -> params`, a tree that may hold structured weights; the
            key drives the randomness of training (adapter dropout), without it there is none. It raises for a
            method that advances and has not.
        model: `forward -> forward`, a rewrite of the stack of blocks.
        around: what it does to the gradients and updates of its own part of the trainable.
        advances: what it does to itself before steps, each when it is due.
        placement: where its trained values lie between steps, if not beside the base.
        cut: which parameters of the base get no gradient beside it.
        checks: what a run asks before its first step, on rows of its first batch; of a chain, called with
            the whole chain.
        parts: the methods of a chain by their names in it.
        codings: `params -> how each of its weights is coded`, by path, for a method that does that alone; a
            checkpoint is then coded as it is read, see `pj.load`.
        stored: `(frozen, trainable) -> ` what a file of the adapter holds of the trainable, for a method that
            stores codes; `apply` takes it in the trainable's place, and `stored` gives it back as it is.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.lora(rank=2, targets=["up"])
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, trainable)
        {'up/kernel': {'a': (2, 4), 'b': (2, 8)}}
        >>> method.merge(frozen, trainable)["up"]["kernel"].shape
        (4, 8)
    """

    name: str
    config: Mapping[str, Any]
    init: Callable[[jax.Array, Params], Both]
    apply: Callable[..., Params]
    model: Callable[[Forward], Forward] = lambda forward: forward
    around: Around | None = None
    advances: tuple[Advance, ...] = ()
    placement: Placement | None = None
    cut: GradientCut | None = None
    checks: tuple[Check, ...] = ()
    parts: Mapping[str, "Transform"] = field(default_factory=dict)
    codings: Callable[[Params], Mapping[str, Coding]] | None = None
    stored: Callable[[Frozen, Trainable], Trainable] = lambda frozen, trainable: trainable

    def __post_init__(self) -> None:
        object.__setattr__(self, "init", _unshared(self.init, advanced=not self.advances))
        if self.advances:
            object.__setattr__(self, "apply", _once_advanced(self.name, self.apply))

    def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """The transformation of the whole trainable, with what the method does around it.

        Give `update` the frozen part too, `tx.update(gradients, state, trainable, frozen=frozen)`: some
        methods read there what they hold fixed.
        """
        return put_around(tx, self.around)

    def advance(
        self,
        loss: Loss | None,
        frozen: Frozen,
        trainable: Trainable,
        opt_state: Any,
        *,
        step: int,
        key: jax.Array,
        tx: optax.GradientTransformation,
    ) -> tuple[Frozen, Trainable, Any]:
        """What the method does before a step; nothing, for most methods, so that any loop may call it.

        `pj.training` does it, compiled and with memory given back; this is for a loop of one's own. What is
        returned may share arrays with what was given.

        Args:
            loss: `params -> scalar` of the step's batch, differentiable; None where the method needs none.
            frozen: of the method.
            trainable: what is trained.
            opt_state: the state of `tx`.
            step: the number of the step that follows, from 0.
            key: for its randomness.
            tx: what `optimizer` gave.
        """
        frozen = replace(frozen, advanced=True)
        state = OptimizerState(opt_state, tx, self.begin(frozen, trainable)[1])
        for one in self.advances:
            if one.due(step):
                for part in range(one.parts(frozen)):
                    number = jnp.asarray(step, jnp.int32)
                    frozen, trainable, state = one.run(
                        loss, frozen, trainable, state, step=number, key=key, part=part
                    )
        return frozen, trainable, state.state

    def open(self, frozen: Frozen, trainable: Trainable) -> Both:
        """The trained values beside the base, which is as it was; see `Placement`."""
        return (frozen, trainable) if self.placement is None else self.placement.open(frozen, trainable)

    def close(self, frozen: Frozen, trainable: Trainable) -> Both:
        """The trained values in the base where the method keeps them there; see `Placement`."""
        return (frozen, trainable) if self.placement is None else self.placement.close(frozen, trainable)

    def begin(self, frozen: Frozen, trainable: Trainable) -> Both:
        """What a step starts from: opened, where a step does not train in the base itself."""
        if self.placement is None or self.placement.stays_closed:
            return frozen, trainable
        if not self.parts:
            return self.placement.open(frozen, trainable)
        return through_parts(self.parts, "begin", frozen, trainable)

    def end(self, frozen: Frozen, trainable: Trainable) -> Both:
        """What a step ends with: closed, where `begin` opened it."""
        if self.placement is None or self.placement.stays_closed:
            return frozen, trainable
        if not self.parts:
            return self.placement.close(frozen, trainable)
        return through_parts(self.parts, "end", frozen, trainable)

    @property
    def in_place(self) -> bool:
        """Whether the base's own arrays may come to hold trained values, so that a step needs no copy."""
        if self.parts:
            return any(part.in_place for part in self.parts.values())
        return self.placement is not None and self.placement.stays_closed

    @overload
    def merge(
        self, frozen: Frozen, trainable: Trainable, *, safe: bool = False, keep_dense: Literal[True] = True
    ) -> Params: ...

    @overload
    def merge(
        self, frozen: Frozen, trainable: Trainable, *, safe: bool = False, keep_dense: Literal[False]
    ) -> tuple[Params, dict[str, RoundingError]]: ...

    def merge(
        self, frozen: Frozen, trainable: Trainable, *, safe: bool = False, keep_dense: bool = True
    ) -> Params | tuple[Params, dict[str, RoundingError]]:
        """Plain arrays of the structure and dtypes of the original parameters; `frozen` stays as it is.

        Weights of 16 bits are merged in float32 and rounded once. With `keep_dense=False` what was quantized
        stays so: a changed weight is decoded, changed and coded again in its format, and the result is
        `(params, errors)`, with the `RoundingError` of each such weight by path.

        Args:
            frozen: of the method, with any trainable's values in its base.
            trainable: the adapter.
            safe: check the result, outside `jit`.
            keep_dense: whether merged weights are arrays also where their base is codes.

        Raises:
            PeftError: the method adds what no weight can hold; with `safe`, a merged parameter has a NaN or
                an infinity.
        """
        frozen, trainable = self.close(replace(frozen, advanced=True), trainable)
        applied = self.apply(frozen, trainable)
        added = tree.named_leaves(applied).keys() - tree.named_leaves(frozen.params).keys()
        if added:
            raise PeftError(
                f"merge: {self.name} adds {min(added)!r}, which no weight of the model can hold; "
                "run the adapted model, method.model(model), instead"
            )
        for path, leaf in tree.named_leaves(applied).items():
            if isinstance(leaf, Weight) and not leaf.has_dense:
                raise PeftError(
                    f"merge: {self.name} adds to {path!r} what depends on the tokens of a call, which no "
                    "weight can hold; run the adapted model, method.model(model), instead"
                )
        errors: dict[str, RoundingError] = {}

        def one(path: str, leaf: Any) -> Any:
            if keep_dense or not isinstance(leaf, Weight):
                return _merged(leaf)
            base = coded_base(leaf)
            if base is None:
                return leaf if isinstance(leaf, Quantized) else _merged(leaf)
            coded, errors[path] = requantized(leaf, base)
            return coded

        merged = tree.map_named(one, applied)
        if safe:
            for path, leaf in tree.named_leaves(merged).items():
                if not tree.is_array(leaf):
                    continue
                if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(dense(leaf)).all()):
                    raise PeftError(f"merge: parameter {path!r} has values that are not finite")
        return merged if keep_dense else (merged, errors)


def part_of(frozen: Frozen, name: str, params: Params) -> Frozen:
    """The part of a chain's `frozen` that belongs to one of its methods."""
    return Frozen(params, frozen.state[name], dict(frozen.plan)[name])


def through_parts(parts: Mapping[str, Transform], hook: str, frozen: Frozen, trainable: Trainable) -> Both:
    """A method of `Transform`, such as `open` or `begin`, on all parts of a chain, the first innermost."""
    params, states, plans, values = frozen.params, {}, {}, {}
    for name, part in parts.items():
        own, values[name] = getattr(part, hook)(part_of(frozen, name, params), trainable[name])
        params, states[name], plans[name] = own.params, own.state, own.plan
    return replace(frozen, params=params, state=states, plan=tuple(plans.items())), values


def changing_state(method: Transform, state: State) -> State:
    """The arrays of `frozen.state` that the method's advances change, which a checkpoint has to hold."""
    if method.parts:
        found = {name: changing_state(part, state[name]) for name, part in method.parts.items()}
        return {name: own for name, own in found.items() if own}
    names = {name for advance in method.advances for name in advance.changes}
    found = {path: {n: slot for n, slot in slots.items() if n in names} for path, slots in state.items()}
    return {path: own for path, own in found.items() if own} if names else {}


def with_changing_state(state: State, changed: State) -> State:
    """The state with the arrays that `changing_state` took out of another one."""
    if not isinstance(changed, Mapping):
        return changed
    return {
        name: with_changing_state(old, changed[name]) if name in changed else old
        for name, old in state.items()
    }


def _unshared(init: Callable[..., Both], *, advanced: bool) -> Callable[..., Both]:
    """`init` with a copy of each trained array, and of each of the state, that is one of the parameters.

    Args:
        init: of a method.
        advanced: whether the method may be applied as it is then.
    """

    @functools.wraps(init)
    def copying(key: jax.Array, params: Params) -> Both:
        frozen, trainable = init(key, params)
        taken = {id(leaf) for leaf in jax.tree.leaves((params, frozen.params))}

        def own(leaf: Any) -> Any:
            shared = id(leaf) in taken
            taken.add(id(leaf))
            return jnp.copy(leaf) if shared and isinstance(leaf, jax.Array | np.ndarray) else leaf

        state, trainable = jax.tree.map(own, (frozen.state, trainable))
        return replace(frozen, state=state, advanced=advanced), trainable

    return copying


def _once_advanced(name: str, apply: Callable[..., Params]) -> Callable[..., Params]:
    @functools.wraps(apply)
    def checked(frozen: Frozen, trainable: Trainable, *, key: jax.Array | None = None) -> Params:
        if not frozen.advanced:
            raise PeftError(
                f"{name} changes itself between steps, and has not yet: train with pj.training(method, loss, "
                "tx), or call method.advance(loss, frozen, trainable, opt_state, step=..., key=..., tx=...) "
                "before each step of your own loop"
            )
        return apply(frozen, trainable, key=key)

    return checked


def _merged(leaf: Any) -> jax.Array:
    """The array that a leaf stands for, in its dtype: of a weight of 16 bits in float32, rounded once."""
    if not isinstance(leaf, Weight) or jnp.dtype(leaf.dtype).itemsize >= 4:
        return dense(leaf)
    return dense(leaf.cast(jnp.float32)).astype(leaf.dtype)
