"""Checks of what every method, weight and optimizer of this library does, for those of other packages.

    import peftjax as pj
    import peftjax.testing

    pj.testing.check_method(my_method(rank=2))
    pj.testing.check_weight(MyWeight(...))
    pj.testing.check_optimizer(my_optimizer(1e-3))

Each raises an `AssertionError` that says what failed. The tests of this project run the same checks.
"""

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
from peftjax.core.errors import PeftError
from peftjax.interpreter import adapt
from peftjax.train.step import Training, divided, training
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight

__all__ = ["Case", "Model", "check_method", "check_optimizer", "check_weight", "small_model"]

KEY = jax.random.key(7)
RATE = 1e-3


# Methods.


@dataclass(frozen=True)
class Model:
    """What a method is checked on.

    Attributes:
        forward: `(params, batch) -> outputs`, or a backbone.
        params: its parameters, none of them zeros or ones, so that every comparison can fail.
        batch: inputs.
        name: of the model.
    """

    forward: Callable[..., Any]
    params: Params
    batch: Any
    name: str = "model"

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The model itself, compiled."""
        return jax.jit(self.forward)


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


def small_model() -> Model:
    """A lookup, two linear layers, a norm's scale and a tied output, of width 8."""
    keys = iter(jax.random.split(KEY, 6))

    def drawn(*shape: int) -> jax.Array:
        return 0.3 * jax.random.normal(next(keys), shape)

    params = {
        "words": {"embedding": drawn(11, 8)},
        "up": {"kernel": drawn(8, 12), "bias": drawn(12)},
        "down": {"kernel": drawn(12, 8)},
        "norm": {"scale": 1.0 + drawn(8)},
    }

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        words = params["words"]["embedding"]
        hidden = jnp.tanh(jnp.take(words, tokens, axis=0) @ params["up"]["kernel"] + params["up"]["bias"])
        hidden = params["norm"]["scale"] * jnp.tanh(hidden @ params["down"]["kernel"])
        return hidden @ words.T

    return Model(forward, params, jax.random.randint(KEY, (2, 5), 0, 11))


def moved(values: Any, seed: int = 0) -> Any:
    """A tree as after some steps of training: every number moved by its own random amount."""
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.1 * noise.standard_normal(leaf.shape), leaf.dtype), values
    )


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
    base = case.model.compiled(case.model.params, case.model.batch).astype(jnp.float32)
    difference = float(jnp.abs(case.at_fresh["out"] - base).max())
    assert (difference < 1e-5) == case.starts_as_base, f"a fresh adapter moves the outputs by {difference}"


def a_trained_adapter_is_finite_and_changes_the_outputs(case: Case) -> None:
    """By more than rounding."""
    out = case.at_trained["out"]
    assert bool(jnp.isfinite(out).all()), "outputs are not finite"
    difference = float(jnp.abs(out - case.model.compiled(case.model.params, case.model.batch)).max())
    assert difference > 1e-3, f"a trained adapter moves the outputs by {difference} only"


def every_trained_leaf_gets_a_finite_gradient_that_is_not_zero(case: Case) -> None:
    """Of its own shape and dtype."""
    for path, grad, leaf in pairs(case.at_trained["grads"], case.trained):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype), path
        assert bool(jnp.isfinite(grad).all()), path
        if not shifts_scores(path):
            assert (float(jnp.abs(grad).max()) > 0) != only_decays(path), path


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
        message = _refusal(lambda: case.method.merge(case.frozen, case.trained))
        assert message.startswith(f"merge: {case.method.name} adds "), message
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
    poisoned = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), case.trained)
    before = numbers(case.given)
    message = _refusal(lambda: case.method.merge(case.frozen, poisoned, safe=True))
    assert message.endswith("has values that are not finite"), message
    assert same(case.given, before), "merge has changed what it was given"


def an_advance_changes_of_the_state_what_it_says(case: Case) -> None:
    """And leaves `apply` to a method that has advanced."""
    method, params = case.method, case.model.params
    if not method.advances:
        return
    frozen, trainable = method.init(KEY, params)
    message = _refusal(lambda: method.apply(frozen, trainable))
    assert "method.advance(" in message, message
    changes = {name for advance in method.advances for name in advance.changes}
    run = adapt(method.model(case.model.forward))

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


# Weights.


def check_weight(weight: Weight, *, tolerance: float = 1e-5) -> None:
    """Check that a model may use a structured weight wherever it uses the array that it stands for.

    Products with its inputs and its outputs, lookups, casts and slices give what the dense array gives, or a
    PeftError, with and without `jit`; and so do the gradients of the activation and of the weight's own float
    arrays.

    Args:
        weight: with a layout; a stack's axes lead, as `jnp.matmul` has them.
        tolerance: of the largest number, in float32.

    Raises:
        AssertionError: it does not; the message says what failed.
    """
    matrix = weight.dense()
    assert (matrix.shape, matrix.dtype) == (tuple(weight.shape), weight.dtype), "shape or dtype of dense()"
    assert matrix.ndim >= 2, "a weight has at least two axes"
    *stack, n, m = matrix.shape
    entering, leaving = (0.3 * jax.random.normal(KEY, (*stack, 5, size)) for size in (n, m))
    uses: dict[str, tuple[Callable[..., Any], jax.Array]] = {
        "x @ w": (lambda w, x: x @ w, entering),
        "x @ w.T": (lambda w, x: x @ jnp.swapaxes(w, -1, -2), leaving),
        "x @ w in bfloat16": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), entering),
    }
    if not stack:
        rows = jnp.arange(5) % n
        uses["w[rows]"] = (lambda w, x: jnp.take(w, rows, axis=0) * x[:, :1], entering)
        uses["x @ w[:, :k]"] = (lambda w, x: x @ w[:, : max(1, m // 2)], entering)
    else:
        uses["x @ w[0]"] = (lambda w, x: x[0] @ w[0], entering)
    held = 0
    for name, (use, x) in uses.items():
        try:
            held += _acts_as_dense(name, use, weight, x, 5e-2 if "bfloat16" in name else tolerance)
        except PeftError:
            continue  # a use that it has no rule for
    assert held, "no use of it works: neither products nor lookups"


def _acts_as_dense(name: str, use: Callable[..., Any], weight: Weight, x: jax.Array, tolerance: float) -> int:
    """One use of a weight against that of its array: outputs and gradients."""

    def of_weight(weight: Weight, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = adapt(use)(weight, x).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    def of_dense(weight: Weight, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = use(weight.dense(), x).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    def both(fn: Callable[..., Any]) -> Any:
        grads = jax.value_and_grad(fn, (0, 1), has_aux=True, allow_int=True)
        (_, out), (of_parts, of_x) = jax.jit(grads)(weight, x)
        floats = [g for g in jax.tree.leaves(of_parts) if g.dtype != jax.dtypes.float0]
        return out, floats, of_x

    got, want = both(of_weight), both(of_dense)
    assert_close(adapt(use)(weight, x).astype(jnp.float32), want[0], tolerance, what=f"{name}, without jit")
    assert_close(got, want, tolerance, what=name)
    return 1


# Optimizers.


def check_optimizer(tx: optax.GradientTransformation, params: Any | None = None) -> None:
    """Check that an optimizer can be used wherever one of optax can.

    Its state has the same structure, shapes and dtypes after each step, its updates those of the parameters;
    the loss of a parabola falls; it makes the same step in a chain, for a part of the parameters and with
    gradients that are accumulated over steps; and a state that was stored as arrays goes on bit by bit.

    Args:
        tx: the optimizer, with a learning rate that is small enough for numbers of size one.
        params: by default a stack of matrices with biases and norms, as the library's backbones have.

    Raises:
        AssertionError: it cannot; the message says what failed.
    """
    params = _parameters() if params is None else params
    grads = [moved(jax.tree.map(jnp.zeros_like, params), seed) for seed in range(1, 4)]
    state, step = tx.init(params), _optimizer_step(tx)
    shapes = _shapes_of(state)
    current = params
    for number, gradient in enumerate(grads):
        updates, state, current = step(gradient, state, current)
        assert _shapes_of(updates) == _shapes_of(params), "updates are not shaped as the parameters"
        assert _shapes_of(state) == shapes, f"the state is another after step {number + 1}"
    stored = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), (state, current))
    again, wanted = step(grads[0], *stored)[2], step(grads[0], state, current)[2]
    assert same(again, wanted), "a stored state does not go on as the one in memory"
    _falls(tx, params)
    first = step(grads[0], tx.init(params), params)[2]
    chained = optax.chain(optax.clip_by_global_norm(1e9), tx)
    in_chain = _optimizer_step(chained)(grads[0], chained.init(params), params)[2]
    assert_close(in_chain, first, 1e-6, what="in a chain")
    _works_for_a_part(tx, params, grads[0], first)
    _works_with_gathered_gradients(tx, params, grads[0], first)


def _optimizer_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any, Any]]:
    @jax.jit
    def step(gradient: Any, state: Any, params: Any) -> tuple[Any, Any, Any]:
        updates, state = tx.update(gradient, state, params)
        return updates, state, optax.apply_updates(params, updates)

    return step


def _falls(tx: optax.GradientTransformation, params: Any) -> None:
    """The loss of a parabola, in twenty steps."""
    goal, step = moved(params, 9), _optimizer_step(tx)

    def loss(params: Any) -> jax.Array:
        gaps = jax.tree.map(lambda p, q: jnp.sum(jnp.square(p - q)), params, goal)
        return sum(jax.tree.leaves(gaps), jnp.zeros(()))

    state, current = tx.init(params), params
    for _ in range(20):
        _, state, current = step(jax.grad(loss)(current), state, current)
    assert float(loss(current)) < float(loss(params)), "twenty steps do not lower the loss of a parabola"


def _works_for_a_part(tx: optax.GradientTransformation, params: Any, gradient: Any, first: Any) -> None:
    """In `optax.partition` each part at the top of the tree but the last moves as with the others."""
    *some, last = params
    labels = {**dict.fromkeys(some, "own"), last: "other"}
    parts = optax.partition({"own": tx, "other": optax.set_to_zero()}, labels)
    got = _optimizer_step(parts)(gradient, parts.init(params), params)[2]
    assert_close(got, {**first, last: params[last]}, 1e-6, what="for a part of the parameters")


def _works_with_gathered_gradients(
    tx: optax.GradientTransformation, params: Any, gradient: Any, first: Any
) -> None:
    several = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    step, state = _optimizer_step(several), several.init(params)
    _, state, current = step(gradient, state, params)
    assert same(current, params), "a gradient that is gathered moves the parameters"
    assert_close(step(gradient, state, current)[2], first, 1e-6, what="with gathered gradients")


def _parameters() -> Any:
    shapes = {
        "blocks": {
            "query": {"kernel": (2, 8, 16), "bias": (2, 16)},
            "down": {"kernel": (2, 16, 8)},
            "norm": {"scale": (2, 8)},
        },
        "head": {"kernel": (8, 4)},
    }
    zeros = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda node: isinstance(node, tuple))
    return jax.tree.map(lambda leaf: 10.0 * leaf, moved(zeros))


def _shapes_of(values: Any) -> Any:
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), values)


# Comparisons.


def assert_close(actual: Any, wanted: Any, tolerance: float = 1e-5, *, what: str = "") -> None:
    """Every pair of leaves equal to `tolerance` of the largest wanted number."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted), f"{what}: trees of another structure"
    leaves = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted))
    for (path, left), right in leaves:
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        bound = tolerance * max(1.0, float(np.abs(right).max(initial=0.0)))
        said = f"{what} {jax.tree_util.keystr(path)}".strip()
        np.testing.assert_allclose(left, right, rtol=0, atol=bound, err_msg=said)


def pairs(left: Any, right: Any) -> list[tuple[str, Any, Any]]:
    """The leaves of two trees of one structure, with their paths."""
    assert jax.tree.structure(left) == jax.tree.structure(right), "trees of another structure"
    leaves = zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right))
    return [(jax.tree_util.keystr(path), ours, theirs) for (path, ours), theirs in leaves]


def numbers(values: Any) -> list[np.ndarray]:
    """Copies of the arrays, but for random keys."""
    leaves = jax.tree.leaves(values)
    return [np.array(leaf) for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)]


def same(left: Any, right: Any) -> bool:
    """Whether the numbers of two trees are equal, to the bit."""
    left, right = numbers(left), numbers(right)
    return len(left) == len(right) and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(left, right))


def only_decays(path: str) -> bool:
    """Whether the leaf is a projected weight's factor, which an optimizer's weight decay alone moves."""
    return path.endswith("['shrink']")


def shifts_scores(path: str) -> bool:
    """Whether the leaf is the bias of a block's keys, whose gradient is zero but for rounding."""
    return path.endswith("['key']['bias']")


def _refusal(call: Callable[[], Any]) -> str:
    """What the PeftError says that the call has to end with."""
    try:
        call()
    except PeftError as error:
        return str(error)
    raise AssertionError("this has to be refused with a PeftError, and was not")
