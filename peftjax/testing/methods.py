"""What every method does, on a model: one step of `pj.training`, the start, the merged weights."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax.core import tree
from peftjax.interpreter import adapt
from peftjax.testing.comparisons import assert_close, numbers, pairs, refusal, same
from peftjax.testing.model import KEY, Model, moved, small_model
from peftjax.train.step import Training, divided, training
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform

RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """A method on a model, as it starts and as trained, and one step of `pj.training` on it.

    Attributes:
        method: the method.
        model: what it is on.
        frozen: of the method, as it starts.
        fresh: what it trains, as it starts.
        trained: the same after some training.
        step: `(trainable, frozen, batch) -> ` what `step_of` says.
        mergeable: whether `merge` gives a model with the same outputs.
        starts_as_base: whether a fresh adapter leaves the model's outputs as they were.
    """

    method: Transform
    model: Model
    frozen: Frozen
    fresh: Trainable
    trained: Trainable
    step: Callable[..., dict[str, Any]]
    mergeable: bool = True
    starts_as_base: bool = True

    @functools.cached_property
    def at_fresh(self) -> dict[str, Any]:
        """The step of the fresh adapter."""
        return self.step(self.fresh, self.frozen, self.model.batch)

    @functools.cached_property
    def at_trained(self) -> dict[str, Any]:
        """The step of the trained one."""
        return self.step(self.trained, self.frozen, self.model.batch)

    @property
    def given(self) -> Any:
        """All that a check hands in, and that must stay as it is."""
        return (self.frozen, self.fresh, self.trained, self.model.params)


class _Recorded(NamedTuple):
    """The state of an optimizer that remembers the gradients it was given."""

    gradients: Any


_RECORDING = optax.GradientTransformation(_Recorded, lambda g, state, params=None: (g, _Recorded(g)))


def step_of(method: Transform, forward: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """`(trainable, frozen, batch)` to all that one step of `pj.training` says: loss, out, grads, stepped."""
    run = adapt(method.model(forward))

    def loss(params: Params, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        out = run(params, batch).astype(jnp.float32)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return {"loss": jnp.sum(weight * jnp.sin(out)), "out": out}, jnp.ones(())

    made: Training = training(method, loss, optax.chain(_RECORDING, optax.sgd(RATE)))

    def step(trainable: Trainable, frozen: Frozen, batch: Any) -> dict[str, Any]:
        state = made.tx.init(method.begin(frozen, trainable)[1])
        moved_part, fixed = divided(frozen, made.moves)
        stepped, state, _, said = made.run_step(trainable, state, moved_part, fixed, batch, None)
        return {**said, "grads": optax.tree.get(state, "gradients"), "stepped": stepped}

    return step


def begun(method: Transform, params: Params) -> tuple[Frozen, Trainable]:
    """What `init` gives, marked as advanced, so that it can be applied."""
    frozen, trainable = method.init(KEY, params)
    return dataclasses.replace(frozen, advanced=True), trainable


def case_of(
    method: Transform,
    model: Model,
    *,
    compiled: bool = True,
    mergeable: bool = True,
    starts_as_base: bool = True,
) -> Case:
    """The method on the model, its step compiled or not; the facts are those of `Case`.

    Raises:
        PeftError: the method finds nothing to adapt in the model.
    """
    frozen, fresh = begun(method, model.params)
    step = step_of(method, model.forward)
    step = jax.jit(step) if compiled else step
    return Case(method, model, frozen, fresh, moved(fresh), step, mergeable, starts_as_base)


def check_method(
    method: Transform, model: Model | None = None, *, mergeable: bool = True, starts_as_base: bool = True
) -> None:
    """Check that a method does what every method of this library does.

    Args:
        method: made with options for a small model.
        model: what to check it on; by default `small_model()`. A method of blocks needs a backbone.
        mergeable: whether `merge` gives a model with the same outputs.
        starts_as_base: whether a fresh adapter leaves the model's outputs as they were.

    Raises:
        AssertionError: it does not; the message says what failed.
        PeftError: it does not fit the model.
    """
    case = case_of(method, model or small_model(), mergeable=mergeable, starts_as_base=starts_as_base)
    for check in (*METHOD_CHECKS, *START_CHECKS):
        check(case)


def a_fresh_adapter_leaves_the_outputs_as_they_were(case: Case) -> None:
    """Unless it is said to start elsewhere."""
    base = np.asarray(case.model.compiled(case.model.params, case.model.batch), np.float32)
    difference = float(np.abs(np.asarray(case.at_fresh["out"]) - base).max())
    assert (difference < 1e-5) == case.starts_as_base, f"a fresh adapter moves the outputs by {difference}"


def a_trained_adapter_is_finite_and_changes_the_outputs(case: Case) -> None:
    """By more than rounding."""
    out = np.asarray(case.at_trained["out"])
    assert np.isfinite(out).all(), "outputs are not finite"
    base = np.asarray(case.model.compiled(case.model.params, case.model.batch), np.float32)
    difference = float(np.abs(out - base).max())
    assert difference > 1e-3, f"a trained adapter moves the outputs by {difference} only"


def every_trained_leaf_gets_a_finite_gradient_that_is_not_zero(case: Case) -> None:
    """Of its own shape and dtype, which gives way to no other's: a second program would follow."""
    for path, leaf, _ in pairs(case.fresh, case.trained):
        assert not leaf.weak_type, f"{path} is weakly typed"
    for path, grad, leaf in pairs(case.at_trained["grads"], case.trained):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype), path
        size = np.abs(np.asarray(grad, np.float32))
        assert np.isfinite(size).all(), path
        if not shifts_scores(path):
            assert (size.max() > 0) != only_decays(path), path


def a_step_changes_all_that_is_trained_and_nothing_else_and_lowers_the_loss(case: Case) -> None:
    """What is given stays as it is."""
    before = numbers(case.given)
    stepped = case.at_trained["stepped"]
    for path, new, old in pairs(stepped, case.trained):
        assert new.dtype == old.dtype, path
        as_it_was = only_decays(path) or shifts_scores(path)
        assert as_it_was or not np.array_equal(new, old), path
    after = case.step(stepped, case.frozen, case.model.batch)
    assert float(after["loss"]) < float(case.at_trained["loss"]), "a step does not lower the loss"
    assert same(case.given, before), "a step has changed what it was given"


def what_is_trained_and_what_is_frozen_share_no_array(case: Case) -> None:
    """So that a step may write over what is trained."""
    trained = {id(leaf) for leaf in jax.tree.leaves(case.fresh)}
    assert not trained & {id(leaf) for leaf in jax.tree.leaves(case.frozen)}


def the_merged_model_is_the_adapted_model_and_the_base_is_still_there(case: Case) -> None:
    """In shapes and dtypes of the base; a method that cannot be merged says so."""
    before = numbers(case.given)
    if not case.mergeable:
        message = refusal(lambda: case.method.merge(case.frozen, case.trained))
        told = message.startswith(f"merge: {case.method.name} adds ") or "has no merged weight" in message
        assert told, message
        return
    merged = case.method.merge(case.frozen, case.trained)
    for path, leaf, base in pairs(merged, case.model.params):
        assert (leaf.shape, leaf.dtype) == (base.shape, base.dtype), path
    assert same(case.given, before), "merge has changed what it was given"
    assert_close(case.model.compiled(merged, case.model.batch), case.at_trained["out"])


def an_adapter_comes_back_from_names_and_numpy_arrays(case: Case) -> None:
    """What every file format stores; nothing of the base is among it."""
    stored = {path: np.array(leaf) for path, leaf in tree.named_leaves(case.trained).items()}
    assert len(stored) == len(jax.tree.leaves(case.trained)), "two leaves have one name"
    again = tree.map_named(lambda path, leaf: jnp.asarray(stored[path]), case.trained)
    assert jax.tree.structure(again) == jax.tree.structure(case.trained)
    assert same(again, case.trained)
    assert sum(array.nbytes for array in stored.values()) == tree.nbytes(case.trained)


METHOD_CHECKS: tuple[Callable[[Case], None], ...] = (
    a_fresh_adapter_leaves_the_outputs_as_they_were,
    a_trained_adapter_is_finite_and_changes_the_outputs,
    every_trained_leaf_gets_a_finite_gradient_that_is_not_zero,
    a_step_changes_all_that_is_trained_and_nothing_else_and_lowers_the_loss,
    what_is_trained_and_what_is_frozen_share_no_array,
    the_merged_model_is_the_adapted_model_and_the_base_is_still_there,
    an_adapter_comes_back_from_names_and_numpy_arrays,
)
"""What holds on every model; all of them share one compiled step."""


def the_same_key_gives_the_same_start(case: Case) -> None:
    """In what is frozen and in what is trained."""
    frozen, trainable = begun(case.method, case.model.params)
    assert same(frozen, case.frozen)
    assert same(trainable, case.fresh)


def the_start_can_be_asked_for_its_shapes_alone(case: Case) -> None:
    """By `jax.eval_shape`."""
    shapes = jax.eval_shape(functools.partial(begun, case.method), case.model.params)
    for wanted, found in zip(shapes, (case.frozen, case.fresh)):
        for path, want, leaf in pairs(wanted, found):
            assert (want.shape, want.dtype) == (leaf.shape, leaf.dtype), path


def apply_without_a_key_is_deterministic(case: Case) -> None:
    """To the bit."""
    first, second = (case.method.apply(case.frozen, case.trained) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert same(first, second)


def merging_again_gives_the_same_and_passes_the_safety_check(case: Case) -> None:
    """And numbers that are not finite do not pass it."""
    if not case.mergeable:
        return
    merged = case.method.merge(case.frozen, case.trained)
    assert same(case.method.merge(case.frozen, case.trained, safe=True), merged)
    poisoned = jax.tree.map(lambda leaf: jnp.array(np.full(leaf.shape, np.nan), leaf.dtype), case.trained)
    before = numbers(case.given)
    message = refusal(lambda: case.method.merge(case.frozen, poisoned, safe=True))
    assert message.endswith("has values that are not finite"), message
    assert same(case.given, before), "merge has changed what it was given"


def an_advance_changes_of_the_state_what_it_says(case: Case) -> None:
    """And leaves `apply` to a method that has advanced."""
    method, params = case.method, case.model.params
    if not method.advances:
        return
    frozen, trainable = method.init(KEY, params)
    message = refusal(lambda: method.apply(frozen, trainable))
    assert "method.advance(" in message, message
    changes = {name for advance in method.advances for name in advance.changes}
    run = adapt(method.model(case.model.forward))

    @jax.jit
    def loss(params: Params) -> jax.Array:
        return jnp.sum(jnp.sin(run(params, case.model.batch).astype(jnp.float32)))

    tx = method.optimizer(optax.adam(RATE))
    opt_state = tx.init(method.begin(frozen, trainable)[1])
    steps = [n for n in range(200) if any(advance.due(n) for advance in method.advances)]
    assert steps, "no advance is due in 200 steps"
    new, _, _ = method.advance(loss, frozen, moved(trainable), opt_state, step=steps[0], key=KEY, tx=tx)
    for path, after, before in pairs(new.state, frozen.state):
        assert (after.shape, after.dtype) == (before.shape, before.dtype), path
        if not any(f"['{name}']" in path for name in changes):
            assert np.array_equal(after, before), f"an advance changes {path}, and does not say so"
    for path, after, before in pairs(new.params, frozen.params):
        assert after is before, f"an advance changes {path} of the base"


START_CHECKS: tuple[Callable[[Case], None], ...] = (
    the_same_key_gives_the_same_start,
    the_start_can_be_asked_for_its_shapes_alone,
    apply_without_a_key_is_deterministic,
    merging_again_gives_the_same_and_passes_the_safety_check,
    an_advance_changes_of_the_state_what_it_says,
)
"""What holds on any model if on one."""


def only_decays(path: str) -> bool:
    """Whether the leaf is a projected weight's factor, which an optimizer's weight decay alone moves."""
    return path.endswith("['shrink']")


def shifts_scores(path: str) -> bool:
    """Whether the leaf is the bias of a block's keys, whose gradient is zero but for rounding."""
    return path.endswith("['key']['bias']")
