"""How exact the gradients of a reversible stack are, on a given model, batch and adapter.

The inverse of a reversible layer is exact up to rounding, and rounding errors grow with every layer that is
inverted (see `meft`). Nothing of that shows in the loss, so it is measured: the gradients as training makes
them beside those of the same network by ordinary backpropagation, which inverts nothing.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from peftjax import tree
from peftjax.adapt import adapt
from peftjax.errors import PeftError
from peftjax.methods.blocks.reversible_stack import ReversibleStack
from peftjax.transform import Forward, Frozen, Trainable, Transform

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
            largest absolute error of its inputs as backward makes them, 0 where they are kept.
        gradient_error: the largest relative error of the gradient of a trained parameter, in one layer.
        worst: the parameter that has it.
        threshold: the largest gradient error that is accepted.
        largest_anchor_every: the largest `anchor_every` whose gradient error is accepted; 0 when no pair of
            streams beside the last is needed.
    """

    anchor_every: int
    reconstruction: Mapping[str, tuple[float, ...]]
    gradient_error: float
    worst: str
    threshold: float
    largest_anchor_every: int

    @property
    def passed(self) -> bool:
        """Whether the gradients are exact enough; not where an error is not a number."""
        return self.gradient_error < self.threshold

    def __str__(self) -> str:
        """A few lines for a person."""
        verdict = "pass" if self.passed else "FAIL"
        needed = "" if self.largest_anchor_every else " (none needed)"
        lines = [
            f"meft, anchor_every={self.anchor_every}: gradients {verdict}, relative error "
            f"{self.gradient_error:.1e} (threshold {self.threshold:.0e}), worst in {self.worst}",
            f"largest anchor_every below the threshold: {self.largest_anchor_every}{needed}",
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
    search: bool = True,
) -> MeftReport:
    """The errors of a MEFT method's gradients on one batch; a few rows of it are enough.

    It compiles the gradient twice, and with `search` once for each `anchor_every` that it tries, from none
    down to the first that is accepted. The reference makes every layer again (remat) and keeps its inputs.

    Args:
        method: `pj.meft`, or a chain with it.
        model: the backbone, as `method.model` takes it.
        frozen: from `method.init`.
        trainable: the adapter, as it is in training.
        batch: of the model.
        loss: `(outputs, batch) -> scalar`.
        threshold: the largest relative error of a gradient that is accepted.
        search: whether to look for the largest `anchor_every`; without, it is 1 unless the check passes.

    Raises:
        PeftError: the method has no reversible stack.
    """
    forward = method.model(model)
    stack = getattr(forward, "stack", None)
    if not isinstance(stack, ReversibleStack):
        raise PeftError(f"meft_check: {method.name} has no reversible stack; give pj.meft or a chain with it")

    def gradients(changed: Forward) -> dict[str, Array]:
        def mean(trainable: Trainable, frozen: Frozen, batch: Any) -> Array:
            return loss(adapt(changed)(method.apply(frozen, trainable), batch), batch)

        return tree.named_leaves(jax.jit(jax.grad(mean))(trainable, frozen, batch))

    layers = {forward.num_layers, getattr(forward.encoder, "num_layers", forward.num_layers)}
    remat = "nothing_saveable" if forward.remat in (None, "none") else forward.remat
    exact = gradients(dataclasses.replace(with_stack(forward, num_reversible=0), remat=remat))

    def error(every: int) -> tuple[float, str]:
        return largest_error(gradients(with_stack(forward, every=every)), exact, layers)

    own, worst = error(stack.every)
    largest = stack.every if own < threshold else 1
    if search:
        tried = (e for e in candidates(max(layers)) if (own if e == stack.every else error(e)[0]) < threshold)
        largest = next(tried, 1)
    errors = jax.jit(lambda params, batch: adapt(reconstruction(forward))(params, batch))
    found = errors(method.apply(frozen, trainable), batch)
    values = {name: tuple(map(float, np.asarray(part))) for name, part in found.items()}
    return MeftReport(stack.every, values, own, worst, threshold, largest)


def with_stack(forward: Any, **changes: Any) -> Any:
    """The backbone, and its encoder, with changes to their reversible stacks."""
    encoder = None if forward.encoder is None else with_stack(forward.encoder, **changes)
    return dataclasses.replace(forward, stack=dataclasses.replace(forward.stack, **changes), encoder=encoder)


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
    # What is not a number is the worst there is.
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return errors[worst], worst


def _by_layer(path: str, found: Array, exact: Array, layers: set[int]) -> Iterator[tuple[str, Any, Any]]:
    a, b = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    if a.ndim < 2 or len(a) not in layers:
        yield path, a, b
        return
    for layer in range(len(a)):
        yield f"{path}, layer {layer}", a[layer], b[layer]


def reconstruction(forward: Any) -> Callable[[Any, Any], dict[str, Array]]:
    """`(params, batch) -> errors [reversible layers]` of each stack by its name."""

    def errors(params: Any, batch: Any) -> dict[str, Array]:
        hidden, context = forward.run_embed(params, batch)
        found = {"blocks": forward.stack.reconstruction(forward, params, hidden, context)}
        if forward.encoder is not None:
            of_encoder = {**params["encoder"], "embed": params["embed"]}
            found["encoder"] = reconstruction(forward.encoder)(of_encoder, batch)["blocks"]
        return found

    return errors


def warn_of_inexact(
    method: Transform, model: Forward, frozen: Frozen, trainable: Trainable, batch: Any, loss: Loss
) -> str | None:
    """What a run says before its first step, where the gradients are not exact enough."""
    report = meft_check(method, model, frozen, trainable, batch, loss=loss, search=False)
    if report.passed:
        return None
    report = meft_check(method, model, frozen, trainable, batch, loss=loss)
    return (
        f"meft: on this model and batch the gradients have a relative error of {report.gradient_error:.1e} "
        f"(in {report.worst}), because rounding errors grow with every layer that is inverted; "
        f"anchor_every={report.largest_anchor_every} keeps it below {report.threshold:.0e}"
    )
