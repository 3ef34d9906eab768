"""What a method does around an optimizer: to the gradients before it, and to its updates.

Both are transformations in optax's sense of the method's own part of the trainable, `{path: {slot: array}}`.
They are given `frozen=`, the method's own, where the caller gave `update` one, and the one of the updates
also `gradients=`, those that went into the optimizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import optax

from peftjax.core.errors import PeftError
from peftjax.transform.frozen import Frozen

Own = Mapping[str, Mapping[str, Any]]
"""A method's own part of a tree like the trainable: `{path: {slot: array}}`."""
KEEP = optax.with_extra_args_support(optax.identity())
"""The transformation that changes nothing."""


@dataclass(frozen=True)
class Around:
    """What a method does around an optimizer.

    Attributes:
        gradients: on the gradients of its own part, before the optimizer.
        updates: on the updates of its own part, after the optimizer.
    """

    gradients: optax.GradientTransformationExtraArgs = KEEP
    updates: optax.GradientTransformationExtraArgs = KEEP


class AroundState(NamedTuple):
    """The optimizer's own state, and of both transformations around it theirs."""

    before: Any
    optimizer: Any
    after: Any


def put_around(
    tx: optax.GradientTransformation, around: Around | None
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the whole trainable with the method's own transformations around it."""
    tx = _without_frozen(tx)
    if around is None:
        return tx
    before, after = _on_own(around.gradients), _on_own(around.updates)

    def init(params: Any) -> AroundState:
        return AroundState(before.init(params), tx.init(params), after.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AroundState]:
        gradients, own_before = before.update(updates, state.before, params, **extra)
        updates, own = tx.update(gradients, state.optimizer, params, **extra)
        updates, own_after = after.update(updates, state.after, params, gradients=gradients, **extra)
        return updates, AroundState(own_before, own, own_after)

    return optax.GradientTransformationExtraArgs(init, update)


def _without_frozen(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, not given `frozen`: an optimizer that loops over slices would hold all of it in its loops."""
    tx = optax.with_extra_args_support(tx)

    def update(
        updates: Any, state: Any, params: Any = None, *, frozen: Frozen | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def by_name(
    parts: Mapping[str, optax.GradientTransformationExtraArgs], part_of: Callable[[Frozen, str], Frozen]
) -> optax.GradientTransformationExtraArgs:
    """The transformations of a chain's methods, each on its own part.

    Args:
        parts: by name.
        part_of: what a method has of the chain's `frozen`.
    """
    parts = {name: _on_own(tx) for name, tx in parts.items() if tx is not KEEP}

    def part(values: Any, name: str) -> Any:
        return None if values is None else values.get(name, optax.MaskedNode())

    def init(params: Any) -> dict[str, Any]:
        return {name: tx.init(part(params, name)) for name, tx in parts.items()}

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        frozen: Frozen | None = None,
        gradients: Any = None,
        **extra: Any,
    ) -> tuple[Any, dict[str, Any]]:
        new, states = dict(updates), {}
        for name, tx in parts.items():
            given = {"frozen": None if frozen is None else part_of(frozen, name)}
            given["gradients"] = part(gradients, name)
            own, states[name] = tx.update(
                part(updates, name), state[name], part(params, name), **given, **extra
            )
            if name in updates:
                new[name] = own
        return new, states

    return optax.GradientTransformationExtraArgs(init, update)


def with_frozen(
    tx: optax.GradientTransformationExtraArgs, view: Callable[[Frozen], Frozen]
) -> optax.GradientTransformationExtraArgs:
    """`tx`, given what it has to see of `frozen`."""

    def update(
        updates: Any, state: Any, params: Any = None, *, frozen: Frozen | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        return tx.update(updates, state, params, frozen=None if frozen is None else view(frozen), **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def on_slots(change: Callable[[str, Any], Any]) -> optax.GradientTransformationExtraArgs:
    """The transformation that applies `change(slot, value)` to each array of each weight."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Own, Any]:
        return {
            path: {
                name: value if isinstance(value, optax.MaskedNode) else change(name, value)
                for name, value in slots.items()
            }
            for path, slots in updates.items()
        }, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def require_together(caller: str, own: Own) -> None:
    """Raise a PeftError when an optimizer is given some slots of a weight and not the others."""
    for path, slots in own.items():
        here = [name for name, slot in slots.items() if not isinstance(slot, optax.MaskedNode)]
        if len(here) < len(slots):
            raise PeftError(
                f"{caller}: of {path!r} this optimizer is given {', '.join(here)} and not "
                f"{', '.join(sorted(slots.keys() - set(here)))}; in optax.multi_transform or optax.masked, "
                "give all arrays of a weight the same label"
            )


def require_given(caller: str, params: Any, frozen: Frozen | None) -> Frozen:
    """`frozen`, when an update is given all that the method needs.

    Raises:
        PeftError: it is not.
    """
    if params is None or frozen is None:
        raise PeftError(
            f"{caller}: the update needs what the method holds fixed; call "
            "tx.update(gradients, state, trainable, frozen=frozen)"
        )
    return frozen


def _on_own(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`tx` on the weights that optax has not masked out (`optax.multi_transform`), the others as they are."""

    def update(
        updates: Any, state: Any, params: Any = None, *, gradients: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        given = {"gradients": _present(gradients)} if gradients is not None else {}
        new, state = tx.update(_present(updates), state, _present(params), **given, **extra)
        return updates if isinstance(updates, optax.MaskedNode) else {**updates, **cast(Own, new)}, state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(_present(params)), update)


def _present(values: Any) -> Any:
    """Without the parts that are masked out as a whole."""
    if isinstance(values, optax.MaskedNode):
        return {}
    if not isinstance(values, Mapping):
        return values
    return {name: part for name, part in values.items() if not _is_masked(part)}


def _is_masked(part: Any) -> bool:
    if isinstance(part, Mapping):
        return bool(part) and all(map(_is_masked, part.values()))
    return isinstance(part, optax.MaskedNode)
