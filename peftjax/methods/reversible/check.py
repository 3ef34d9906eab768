"""How exact the gradients of a reversible stack are, on a given model, batch and adapter.

The inverse of a reversible layer is exact up to rounding, and rounding errors grow with every layer that is
inverted (see `meft`). The loss does not show them, so they are measured: the gradients of training are
compared with those of the same network by ordinary backpropagation, which inverts nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from peftjax.backbone.backbone import Backbone
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.methods.reversible._reversible_stack import ReversibleStack
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.transform import Forward, Transform

THRESHOLD = 1e-3
# A gradient below this part of the largest one is compared with that part of it.
FLOOR = 1e-6
Loss = Callable[[Any, Any], Array]
"""`(outputs, batch) -> loss`."""


@dataclasses.dataclass(frozen=True)
class MeftReport:
    """What `meft_check` found.

    Attributes:
        anchor_every: as the method has it.
        reconstruction: for each stack ("blocks", and "encoder" where there is one) and reversible layer, the
            largest absolute error of its inputs as backward recomputes them, 0 where they are kept.
        gradient_error: the largest relative error of the gradient of a trained parameter, in one layer.
        worst: the parameter that has it.
        bound: the largest gradient error that is accepted.
        largest_anchor_every: the largest `anchor_every` whose gradient error is accepted; 0 when no pair of
            streams beside the last is needed.
    """

    anchor_every: int
    reconstruction: Mapping[str, tuple[float, ...]]
    gradient_error: float
    worst: str
    bound: float
    largest_anchor_every: int

    @property
    def passed(self) -> bool:
        """Whether the gradients are exact enough; False where an error is NaN."""
        return self.gradient_error < self.bound

    def __str__(self) -> str:
        """A few lines for a person."""
        verdict = "pass" if self.passed else "FAIL"
        needed = "" if self.largest_anchor_every else " (none needed)"
        lines = [
            f"meft, anchor_every={self.anchor_every}: gradients {verdict}, relative error "
            f"{self.gradient_error:.1e} (accepted: {self.bound:.0e}), worst in {self.worst}",
            f"largest anchor_every that passes: {self.largest_anchor_every}{needed}",
        ]
        for name, errors in self.reconstruction.items():
            values = " ".join(f"{error:.0e}" for error in errors)
            lines.append(f"error of the inputs of {name}, from layer 0 on: {values}")
        return "\n".join(lines)


def meft_check(
    method: Transform,
    model: Forward,
    frozen: Frozen,
    trainable: Trainable,
    batch: Any,
    *,
    loss: Loss,
    threshold: float = THRESHOLD,
) -> MeftReport:
    """The errors of a MEFT method's gradients on one batch; a few rows of it are enough.

    It compiles the gradient once for the reference, which keeps the inputs of every layer (and no more,
    by remat), and once for each `anchor_every` tried: the method's own, and from none down to the first that
    is accepted.

    Args:
        method: `pj.meft`, or a chain with it.
        model: the backbone, as `method.model` takes it.
        frozen: from `method.init`.
        trainable: the adapter, as it is in training.
        batch: of the model.
        loss: `(outputs, batch) -> scalar`.
        threshold: the largest relative error of a gradient that is accepted; where the backbone does not
            compute in float32, at least twice that of `anchor_every=1`, which inverts nothing and
            so shows what that dtype's own rounding does.

    Raises:
        PeftError: the method has no reversible stack.
    """
    frozen = dataclasses.replace(frozen, advanced=True)
    forward = _reversible(method, model)
    error_of = _gradient_errors(method, forward, frozen, trainable, batch, loss)
    own, worst = error_of(_stack_of(forward).every)
    bound = accepted(error_of, forward, threshold)
    errors = jax.jit(lambda params, batch: adapt(reconstruction(forward))(params, batch))
    found = errors(method.apply(frozen, trainable), batch)
    return MeftReport(
        anchor_every=_stack_of(forward).every,
        reconstruction={name: tuple(map(float, np.asarray(part))) for name, part in found.items()},
        gradient_error=own,
        worst=worst,
        bound=bound,
        largest_anchor_every=_largest(error_of, max(_depths(forward)), bound),
    )


def warn_of_inexact(
    method: Transform, model: Forward, frozen: Frozen, trainable: Trainable, batch: Any, loss: Loss
) -> str | None:
    """The warning of a run before its first step, where the gradients are not exact enough."""
    forward = _reversible(method, model)
    if _stack_of(forward).is_exact:
        return None
    error_of = _gradient_errors(method, forward, frozen, trainable, batch, loss)
    error, worst = error_of(_stack_of(forward).every)
    bound = accepted(error_of, forward, THRESHOLD)
    if error < bound:
        return None
    return (
        f"meft: on this model and batch the gradients have a relative error of {error:.1e} (in {worst}), "
        "because rounding errors grow with every layer that is inverted; anchor_every="
        f"{_largest(error_of, max(_depths(forward)), bound)} keeps it below {bound:.0e}"
    )


def _reversible(method: Transform, model: Forward) -> Backbone:
    forward = method.model(model)
    if not isinstance(forward, Backbone) or not isinstance(forward.stack, ReversibleStack):
        raise PeftError(f"meft_check: {method.name} has no reversible stack; give pj.meft or a chain with it")
    return forward


def _stack_of(forward: Backbone) -> ReversibleStack:
    assert isinstance(forward.stack, ReversibleStack)
    return forward.stack


def _gradient_errors(
    method: Transform, forward: Backbone, frozen: Frozen, trainable: Trainable, batch: Any, loss: Loss
) -> Callable[[int], tuple[float, str]]:
    """`anchor_every -> (the largest error, whose)`, each compiled once."""
    frozen = dataclasses.replace(frozen, advanced=True)  # what a run asks before its first step

    def gradients(changed: Forward) -> dict[str, Array]:
        def value(trainable: Trainable, frozen: Frozen, batch: Any) -> Array:
            return loss(adapt(changed)(method.apply(frozen, trainable), batch), batch)

        return tree.named_leaves(jax.jit(jax.grad(value))(trainable, frozen, batch))

    remat = "nothing_saveable" if forward.remat in (None, "none") else forward.remat
    exact = gradients(dataclasses.replace(with_stack(forward, num_reversible=0), remat=remat))

    @functools.cache
    def error_of(every: int) -> tuple[float, str]:
        return largest_error(gradients(with_stack(forward, every=every)), exact, _depths(forward))

    return error_of


def accepted(error_of: Callable[[int], tuple[float, str]], forward: Backbone, threshold: float) -> float:
    """The threshold, or what the rounding of a shorter dtype does without any inverse."""
    return threshold if forward.dtype == "float32" else max(threshold, 2.0 * error_of(1)[0])


def _largest(error_of: Callable[[int], tuple[float, str]], num_layers: int, bound: float) -> int:
    """The first candidate that is accepted; 1, which inverts nothing, where none is."""
    return next((every for every in candidates(num_layers) if error_of(every)[0] < bound), 1)


def _depths(forward: Backbone) -> set[int]:
    own = {forward.num_layers}
    return own if forward.encoder is None else own | {forward.encoder.num_layers}


def with_stack(forward: Backbone, **changes: Any) -> Backbone:
    """The backbone, and its encoder, with changes to their reversible stacks."""
    encoder = None if forward.encoder is None else with_stack(forward.encoder, **changes)
    return dataclasses.replace(
        forward, stack=dataclasses.replace(_stack_of(forward), **changes), encoder=encoder
    )


def candidates(num_layers: int) -> list[int]:
    """Values of `anchor_every` that keep different numbers of pairs, the fewest first."""
    every = dict.fromkeys(-(-num_layers // pairs) for pairs in range(2, num_layers + 1))
    return [0, *every]


def largest_error(
    found: Mapping[str, Array], exact: Mapping[str, Array], layers: set[int]
) -> tuple[float, str]:
    """The largest relative error of a gradient, layer by layer where it is stacked, and whose it is."""
    pairs = [
        (name, np.linalg.norm(a - b), np.linalg.norm(b))
        for path in exact
        for name, a, b in _by_layer(path, found[path], exact[path], layers)
    ]
    floor = FLOOR * max((size for *_, size in pairs), default=0.0)
    errors = {name: float(off / max(size, floor, np.finfo(np.float64).tiny)) for name, off, size in pairs}
    # NaN is the worst error.
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return errors[worst], worst


def _by_layer(path: str, found: Array, exact: Array, layers: set[int]) -> Iterator[tuple[str, Any, Any]]:
    a, b = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    if a.ndim < 2 or len(a) not in layers:
        yield path, a, b
        return
    for layer in range(len(a)):
        yield f"{path}, layer {layer}", a[layer], b[layer]


def reconstruction(forward: Backbone) -> Callable[[Any, Any], dict[str, Array]]:
    """`(params, batch) -> errors [reversible layers]` of each stack by its name."""

    def errors(params: Any, batch: Any) -> dict[str, Array]:
        hidden, context = forward.run_embed(params, batch)
        found = {"blocks": _stack_of(forward).reconstruction(forward, params, hidden, context)}
        if forward.encoder is not None:
            of_encoder = {**params["encoder"], "embed": params["embed"]}
            found["encoder"] = reconstruction(forward.encoder)(of_encoder, batch)["blocks"]
        return found

    return errors
