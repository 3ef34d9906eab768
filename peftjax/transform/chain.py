"""Several methods as one: each hook of the whole is that of its parts, the first method innermost."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import optax

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.transform.transform import Forward, Frozen, Params, Renewal, Trainable, Transform
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
    """
    if not methods:
        raise PeftError("chain: give at least one method")
    names = _distinct([method.name for method in methods])
    named = dict(zip(names, methods))

    def init(key: jax.Array, params: Params) -> tuple[Frozen, dict[str, Trainable]]:
        base, states, plans, trainables = params, {}, {}, {}
        current, trained, adapted = params, {}, {}
        for name, method, subkey in zip(names, methods, jax.random.split(key, len(methods))):
            frozen, trainable = method.init(subkey, current)
            base = _fold_base(name, base, current, frozen.params, trained, trainable)
            states[name], plans[name], trainables[name] = frozen.state, frozen.plan, trainable
            # What a method of blocks adds is its own: no later method is shown it.
            applied = tree.named_leaves(method.apply(frozen, trainable))
            current = tree.map_named(lambda path, _, applied=applied: applied[path], base)
            for path, leaf in tree.named_leaves(base).items():
                if isinstance(leaf, tree.Hole):
                    trained.setdefault(path, name)
            adapted |= dict.fromkeys(_adapted(trainable, tree.named_leaves(base)), name)
        review({**adapted, **trained})
        return Frozen(base, states, tuple(plans.items())), trainables

    def own_frozen(frozen: Frozen, name: str, params: Params) -> Frozen:
        return Frozen(params, frozen.state[name], dict(frozen.plan)[name])

    def apply(frozen: Frozen, trainable: Mapping[str, Trainable], *, key: jax.Array | None = None) -> Params:
        params = frozen.params
        for number, (name, method) in enumerate(named.items()):
            subkey = None if key is None else jax.random.fold_in(key, number)
            params = method.apply(own_frozen(frozen, name, params), trainable[name], key=subkey)
        return params

    def renewal_of(name: str, renewal: Renewal) -> Renewal:
        at = names.index(name)

        def run(
            loss: Callable[[Params], jax.Array],
            frozen: Frozen,
            trainable: Mapping[str, Trainable],
            opt_state: Any,
            *,
            prefix: tuple[str, ...] = (),
            **options: Any,
        ) -> tuple[Trainable, Any]:
            def through(params: Params, some: list[str]) -> Params:
                for other in some:
                    params = named[other].apply(own_frozen(frozen, other, params), trainable[other])
                return params

            own, opt_state = renewal.run(
                lambda params: loss(through(params, names[at + 1 :])),
                own_frozen(frozen, name, through(frozen.params, names[:at])),
                trainable[name],
                opt_state,
                prefix=(*prefix, name),
                **options,
            )
            return {**trainable, name: own}, opt_state

        return Renewal(
            renewal.due, run, lambda frozen: renewal.parts(own_frozen(frozen, name, frozen.params))
        )

    def model(forward: Forward) -> Forward:
        for method in methods:
            forward = method.model(forward)
        return forward

    def optimizer(
        tx: optax.GradientTransformation, prefix: tuple[str, ...] = ()
    ) -> optax.GradientTransformation:
        for name, method in named.items():
            tx = method.optimizer(tx, (*prefix, name))
        return tx

    def write(frozen: Frozen, trainable: Mapping[str, Trainable] | None) -> Frozen:
        params, states, plans = frozen.params, dict(frozen.state), dict(frozen.plan)
        for name, method in named.items():
            own = None if trainable is None else trainable[name]
            written = method.write(Frozen(params, states[name], plans[name]), own)
            params, states[name], plans[name] = written.params, written.state, written.plan
        return Frozen(params, states, tuple(plans.items()))

    def review(trained: Mapping[str, str]) -> None:
        for method in methods:
            method.review(trained)

    def moving(trainable: Mapping[str, Trainable]) -> dict[str, Any]:
        return {name: method.moving(trainable[name]) for name, method in named.items()}

    def each(hook: str) -> Callable[[Frozen, Mapping[str, Trainable]], dict[str, Trainable]]:
        def run(frozen: Frozen, trainable: Mapping[str, Trainable]) -> dict[str, Trainable]:
            own = {name: own_frozen(frozen, name, frozen.params) for name in names}
            return {name: getattr(m, hook)(own[name], trainable[name]) for name, m in named.items()}

        return run

    config = {"methods": [{"name": m.name, **m.config} for m in methods]}
    in_place = {"write": write} if any(method.in_place for method in methods) else {}
    checks = tuple(check for method in methods for check in method.checks)
    renewals = tuple(renewal_of(name, r) for name, method in named.items() for r in method.renewals)
    hooks = {"review": review, "checks": checks, "renewals": renewals, "moving": moving, **in_place}
    hooks |= {hook: each(hook) for hook in ("open", "close")}
    return Transform("chain", config, init, apply, model, optimizer, **hooks)


def _fold_base(
    name: str,
    base: Params,
    seen: Params,
    wanted: Params,
    trained: Mapping[str, str],
    trainable: Trainable,
) -> Params:
    """The chain's base after a method that saw `seen` wants `wanted` as its own base."""
    bases, seen_leaves = tree.named_leaves(base), tree.named_leaves(seen)
    changed: dict[str, Any] = {}
    touched = set(trainable) if isinstance(trainable, Mapping) else set()
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
