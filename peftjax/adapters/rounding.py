"""Adapters that were trained as codes, as ordinary adapters of floats."""

from peftjax.methods.quantization.quantized_adapter import NAME, of_adapter, seen
from peftjax.transform.chain import chain
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import build
from peftjax.transform.transform import Transform, part_of


def rounded(method: Transform, frozen: Frozen, trainable: Trainable) -> tuple[Transform, Frozen, Trainable]:
    """The adapter within a `quantized_adapter`, with the matrices that the model has seen.

    Its `(method, frozen, trainable)` is exported, added, mixed and converted as any other.

    Args:
        method: a `pj.quantized_adapter`, or a chain with one; any other method stays as it is.
        frozen: of it.
        trainable: its numbers, or the codes of a file.
    """
    if method.name == NAME:
        inner = build(method.config["method"])
        return inner, of_adapter(frozen), seen(frozen, trainable, method.config["bits"])
    if method.name != "chain":
        return method, frozen, trainable
    made = [
        rounded(part, part_of(frozen, name, frozen.params), trainable[name])
        for name, part in method.parts.items()
    ]
    if all(own is part for (own, _, _), part in zip(made, method.parts.values(), strict=True)):
        return method, frozen, trainable
    whole = chain(*(own for own, _, _ in made))
    named = dict(zip(whole.parts, made, strict=True))
    state = {name: own.state for name, (_, own, _) in named.items()}
    plan = tuple((name, own.plan) for name, (_, own, _) in named.items())
    values = {name: own for name, (_, _, own) in named.items()}
    return whole, Frozen(frozen.params, state, plan, frozen.advanced), values
