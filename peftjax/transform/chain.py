"""Several methods as one: each hook of the whole is that of its parts, the first method innermost."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.transform.around import Around, by_name
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.transform import Advance, Forward, Placement, Transform, part_of, through_parts
from peftjax.weights.base import Weight


def chain(*methods: Transform) -> Transform:
    """Apply several methods to one model, the first innermost.

    The trainable, and the frozen state, are dictionaries by method name ('lora', 'lora_2', ...). A
    later method may adapt what an earlier one left as it was, or wrap a structured weight it made
    (`chain(nf4(), lora())`).

    Raises:
        PeftError: when made, without a method; in `init`, if a method adapts or takes a parameter
            that an earlier one trains, replaces the base of a weight that an earlier one made, or lets no
            gradient reach what another one trains.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((8, 4))}}
        >>> method = pj.chain(pj.lora(rank=2, targets=["up"]), pj.unfreeze(["down"]))
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> {name: list(own) for name, own in trainable.items()}
        {'lora': ['up/kernel'], 'unfreeze': ['down/kernel']}
    """
    if not methods:
        raise PeftError("chain: give at least one method")
    names = _distinct([method.name for method in methods])
    parts = dict(zip(names, methods))

    def init(key: jax.Array, params: Params) -> tuple[Frozen, dict[str, Trainable]]:
        base, states, plans, trainables = params, {}, {}, {}
        current, trained, adapted = params, {}, {}
        for name, method, subkey in zip(names, methods, jax.random.split(key, len(methods))):
            frozen, trainable = method.init(subkey, current)
            base = _fold_base(name, base, current, frozen.params, trained, frozen.state, trainable)
            states[name], plans[name], trainables[name] = frozen.state, frozen.plan, trainable
            # What a method of blocks adds is its own: no later method is shown it.
            applied = tree.named_leaves(method.apply(replace(frozen, advanced=True), trainable))
            current = tree.map_named(lambda path, _, applied=applied: applied[path], base)
            for path, leaf in tree.named_leaves(base).items():
                if isinstance(leaf, tree.Hole):
                    trained.setdefault(path, name)
            leaves = tree.named_leaves(base)
            adapted |= dict.fromkeys(_adapted(trainable, leaves), name)
        _require_gradients(parts, {**adapted, **trained})
        return Frozen(base, states, tuple(plans.items())), trainables

    def apply(frozen: Frozen, trainable: Mapping[str, Trainable], *, key: jax.Array | None = None) -> Params:
        params = frozen.params
        for number, (name, method) in enumerate(parts.items()):
            subkey = None if key is None else jax.random.fold_in(key, number)
            params = method.apply(part_of(frozen, name, params), trainable[name], key=subkey)
        return params

    def model(forward: Forward) -> Forward:
        for method in methods:
            forward = method.model(forward)
        return forward

    def stored(frozen: Frozen, trainable: Mapping[str, Trainable]) -> dict[str, Trainable]:
        return {
            name: method.stored(part_of(frozen, name, frozen.params), trainable[name])
            for name, method in parts.items()
        }

    return Transform(
        "chain",
        {"methods": [{"name": m.name, **m.config} for m in methods]},
        init,
        apply,
        model,
        around=_around(parts),
        advances=tuple(_advance_of(parts, name, a) for name, m in parts.items() for a in m.advances),
        placement=_placement(parts),
        checks=tuple(check for method in methods for check in method.checks),
        parts=parts,
        stored=stored,
    )


def _around(parts: Mapping[str, Transform]) -> Around | None:
    given = {name: part.around for name, part in parts.items() if part.around is not None}
    if not given:
        return None

    def own(frozen: Frozen, name: str) -> Frozen:
        return part_of(frozen, name, frozen.params)

    # Each has a part of its own, so that their order does not matter.
    return Around(
        by_name({name: around.gradients for name, around in given.items()}, own),
        by_name({name: around.updates for name, around in given.items()}, own),
    )


def _placement(parts: Mapping[str, Transform]) -> Placement | None:
    placed = [part.placement for part in parts.values() if part.placement is not None]
    if not placed:
        return None
    hooks = {hook: partial(through_parts, parts, hook) for hook in ("open", "close")}
    return Placement(**hooks, stays_closed=all(placement.stays_closed for placement in placed))


def _advance_of(parts: Mapping[str, Transform], name: str, advance: Advance) -> Advance:
    """A method's advance as one of the chain: its loss goes through the methods before and after it."""
    at = list(parts).index(name)
    earlier, later = list(parts)[:at], list(parts)[at + 1 :]

    def run(
        loss: Callable[[Params], jax.Array] | None,
        frozen: Frozen,
        trainable: Mapping[str, Trainable],
        optimizer: OptimizerState,
        **options: Any,
    ) -> tuple[Frozen, Trainable, OptimizerState]:
        def through(params: Params, some: list[str]) -> Params:
            for other in some:
                params = parts[other].apply(part_of(frozen, other, params), trainable[other])
            return params

        own, values, state = advance.run(
            None if loss is None else lambda params: loss(through(params, later)),
            part_of(frozen, name, through(frozen.params, earlier)),
            trainable[name],
            optimizer.of_part(name),
            **options,
        )
        frozen = replace(frozen, state={**frozen.state, name: own.state})
        return frozen, {**trainable, name: values}, replace(optimizer, state=state.state)

    return replace(advance, run=run, parts=lambda frozen: advance.parts(part_of(frozen, name, frozen.params)))


def _require_gradients(parts: Mapping[str, Transform], trained: Mapping[str, str]) -> None:
    """Raise a PeftError where a method lets no gradient reach what another one trains."""
    for method in parts.values():
        _require_gradients(method.parts, trained)
        if (cut := method.cut) is None:
            continue
        for path, other in trained.items():
            if not path.startswith(cut.spared):
                raise PeftError(
                    f"{method.name}: {path!r} is trained by {other!r}, but no gradient reaches the backbone "
                    f"beside {method.name}; exclude it, merge that method first, or {cut.remedy}"
                )


def _fold_base(
    name: str,
    base: Params,
    seen: Params,
    wanted: Params,
    trained: Mapping[str, str],
    state: Any,
    trainable: Trainable,
) -> Params:
    """The chain's base after a method that saw `seen` wants `wanted` as its own base."""
    bases, seen_leaves = tree.named_leaves(base), tree.named_leaves(seen)
    changed: dict[str, Any] = {}
    touched = {path for own in (state, trainable) if isinstance(own, Mapping) for path in own}
    for path, leaf in tree.named_leaves(wanted).items():
        if path in trained and (leaf is not seen_leaves[path] or path in touched):
            raise PeftError(
                f"chain: {name!r} adapts {path!r}, which {trained[path]!r} already trains; "
                "exclude it from one of the two"
            )
        if leaf is seen_leaves[path]:
            continue
        if isinstance(seen_leaves[path], Weight) or bases[path] is not seen_leaves[path]:
            raise PeftError(
                f"chain: {name!r} replaces the base of {path!r}, which an earlier method rewrote; "
                f"put {name!r} first"
            )
        changed[path] = leaf
    return tree.replace(base, changed)


def _adapted(trainable: Trainable, paths: Collection[str]) -> Iterator[str]:
    """The paths of the parameters that a trainable has something for, of chains inside it too."""
    for name, part in trainable.items() if isinstance(trainable, Mapping) else ():
        if name in paths:
            yield name
        else:
            yield from _adapted(part, paths)


def _distinct(names: list[str]) -> list[str]:
    return [
        name if names[:n].count(name) == 0 else f"{name}_{names[:n].count(name) + 1}"
        for n, name in enumerate(names)
    ]
