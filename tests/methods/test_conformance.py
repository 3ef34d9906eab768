"""What every method of the registry must do, on every tiny model; a new one is covered by its line there.

A method of blocks runs on backbones of the library, any other on models of other makers. One that finds
nothing to adapt in a model (token rows in an image model) is skipped there with its own error as the reason;
on the models of tokens none may be.

One program is compiled for each method and model. What needs another program runs on the smallest model.
"""

import copy
import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, all_but_slow, assert_close, example_of
from tiny_models import BACKBONES, CLASSIFIERS, EVERY_WEIGHT, MODELS, Tiny, moved, tiny

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.train.step import divided

RATE = 1e-3
# A parameter of the smallest models that a method may leave as it is.
NORM = {"words": "norm/scale", "backbone": "head/norm/scale"}


def method_of(name: str) -> pj.Transform:
    """The method with its example's options, on every weight it can take."""
    method = example_of(name)
    own = [method.config, *method.config.get("methods", ())]
    if all(config.get("targets") != "all-linear" for config in own):
        return method
    return example_of(name, targets=EVERY_WEIGHT)


def models_of(name: str) -> tuple[str, ...]:
    """The names of the models to test that method on, the smallest first."""
    if pj.METHODS[name].conformance.reads_classifier:
        return CLASSIFIERS
    return BACKBONES if pj.METHODS[name].of_blocks else MODELS


class Recorded(NamedTuple):
    """The state of an optimizer that remembers the gradients it was given."""

    gradients: Any


RECORDING = optax.GradientTransformation(Recorded, lambda grads, state, params=None: (grads, Recorded(grads)))


def step_of(method, forward):
    """`(trainable, frozen, batch)` to all that one step of `pj.training` says, as one function."""
    run = pj.adapt(method.model(forward))

    def loss(params, batch):
        out = run(params, batch).astype(jnp.float32)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return {"loss": jnp.sum(weight * jnp.sin(out)), "out": out}, jnp.ones(())

    training = pj.training(method, loss, optax.chain(RECORDING, optax.sgd(RATE)))

    def step(trainable, frozen, batch):
        state = training.tx.init(method.begin(frozen, trainable)[1])
        parts = divided(frozen, training.moves)
        stepped, state, _, said = training.run_step(trainable, state, *parts, batch, None)
        return {**said, "grads": optax.tree.get(state, "gradients"), "stepped": stepped}

    return step


@dataclass(frozen=True)
class Case:
    """One method on one model, fresh and as trained, and its compiled step."""

    name: str
    info: pj.MethodInfo
    model: Tiny
    method: pj.Transform
    frozen: Any
    fresh: Any
    trained: Any
    step: Any

    @functools.cached_property
    def at_fresh(self):
        return self.step(self.fresh, self.frozen, self.model.batch)

    @functools.cached_property
    def at_trained(self):
        return self.step(self.trained, self.frozen, self.model.batch)

    @property
    def given(self):
        """All that was handed in."""
        return (self.frozen, self.fresh, self.trained, self.model.params)


def only_decays(path):
    """Whether the leaf is a projected weight's factor, which an optimizer's weight decay alone moves."""
    return path.endswith("['shrink']")


def shifts_scores(path):
    """Whether the leaf is the bias of a block's keys, whose gradient is zero but for rounding."""
    return path.endswith("['key']['bias']")


@functools.cache
def made(method_name: str, model_name: str) -> Case | str:
    model, method = tiny(model_name), method_of(method_name)
    try:
        frozen, trainable = begun(method, model.params)
    except PeftError as error:
        if (
            "words" in tree.named_leaves(model.params)
            or model_name in (*BACKBONES, *CLASSIFIERS)
            or "matched no parameter" not in str(error)
        ):
            raise
        return str(error)
    step = step_of(method, model.forward)
    step = (
        jax.jit(step) if model_name in (*MODELS, *BACKBONES, *CLASSIFIERS) else step
    )  # op by op, the methods share what is compiled
    return Case(model_name, pj.METHODS[method_name], model, method, frozen, trainable, moved(trainable), step)


def begun(method, params):
    """As trained by a loop that has advanced the method."""
    frozen, trainable = method.init(KEY, params)
    return dataclasses.replace(frozen, advanced=True), trainable


@functools.cache
def plain(model_name: str):
    """The model itself, compiled."""
    return jax.jit(tiny(model_name).forward)


ANEW = ("lora", "dora", "snell", "paca", "shira", "galore", "switchlora", "rows", "full")
"""One method of each kind of weight."""


def cases():
    """Every method on its models; all but the smallest are long tests, but for one method of each kind."""
    for name in pj.METHODS:
        for number, model in enumerate(models_of(name)):
            slow = [pytest.mark.slow] if number and name not in ANEW else []
            yield pytest.param((name, model), id=f"{name}-{model}", marks=slow)


@pytest.fixture(params=cases())
def case(request):
    found = made(*request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(params=pj.METHODS)
def smallest(request):
    return made(request.param, "backbone" if pj.METHODS[request.param].of_blocks else "words")


@pytest.fixture(params=all_but_slow(pj.METHODS, ANEW))
def anew(request):
    """`smallest`, for what needs a program of its own: by default of one method of each kind of weight."""
    return made(request.param, "backbone" if pj.METHODS[request.param].of_blocks else "words")


@pytest.fixture(params=[name for name, info in pj.METHODS.items() if info.mergeable])
def mergeable(request):
    return made(request.param, "backbone" if pj.METHODS[request.param].of_blocks else "words")


def numbers(values):
    """Copies of the arrays, but for random keys."""
    leaves = jax.tree.leaves(values)
    return [np.array(leaf) for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)]


def same(left, right):
    left, right = numbers(left), numbers(right)
    return len(left) == len(right) and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(left, right))


def cosine(left, right):
    return np.vdot(left, right) / (np.linalg.norm(left) * np.linalg.norm(right))


def pairs(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    leaves = zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right))
    return [(jax.tree_util.keystr(path), ours, theirs) for (path, ours), theirs in leaves]


# Construction.


@pytest.mark.parametrize("name", pj.METHODS)
def test_the_factory_makes_a_method_of_its_name_with_all_its_facts(name):
    info = pj.METHODS[name]
    assert info.factory(**info.conformance.example).name == name
    assert all((info.paper, info.trains, info.backward_keeps, info.factory.__doc__))


def test_a_configuration_survives_json_and_makes_the_same_program(smallest):
    saved = json.dumps(pj.describe(smallest.method))
    again = pj.build(copy.deepcopy(json.loads(saved)))
    assert json.dumps(pj.describe(again)) == saved
    programs = [str(jax.make_jaxpr(m.init)(KEY, smallest.model.params)) for m in (smallest.method, again)]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("name", pj.METHODS)
def test_an_unknown_option_is_an_error_that_names_it(name):
    with pytest.raises(PeftError, match=rf"{name}: .*ranc"):
        pj.build({"name": name, **pj.METHODS[name].conformance.example, "ranc": 4})


def test_the_same_key_gives_the_same_start(smallest):
    frozen, trainable = begun(smallest.method, smallest.model.params)
    assert same(frozen, smallest.frozen)
    assert same(trainable, smallest.fresh)


def test_the_start_can_be_asked_for_its_shapes_alone(smallest):
    shapes = jax.eval_shape(functools.partial(begun, smallest.method), smallest.model.params)
    for wanted, found in zip(shapes, (smallest.frozen, smallest.fresh)):
        for path, want, leaf in pairs(wanted, found):
            assert (want.shape, want.dtype) == (leaf.shape, leaf.dtype), path


# Forward.


def test_a_fresh_adapter_leaves_the_outputs_as_they_were(case):
    base = plain(case.name)(case.model.params, case.model.batch)
    difference = float(jnp.abs(case.at_fresh["out"] - base).max())
    assert (difference < 1e-5) == case.info.conformance.starts_as_base


def test_a_trained_adapter_is_finite_and_changes_the_outputs(case):
    out = case.at_trained["out"]
    assert bool(jnp.isfinite(out).all())
    assert float(jnp.abs(out - plain(case.name)(case.model.params, case.model.batch)).max()) > 1e-3


def test_apply_without_a_key_is_deterministic(smallest):
    first, second = (smallest.method.apply(smallest.frozen, smallest.trained) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert same(first, second)


def test_one_row_of_another_length(anew):
    batch = jax.tree.map(lambda tokens: tokens[:1, :3], anew.model.batch)
    run = pj.adapt(anew.method.model(anew.model.forward))
    out = run(anew.method.apply(anew.frozen, anew.trained), batch)
    whole = jax.eval_shape(anew.model.forward, anew.model.params, batch)
    assert out.shape == whole.shape
    if anew.info.mergeable:
        merged = anew.method.merge(anew.frozen, anew.trained)
        assert_close(out, plain(anew.name)(merged, batch))


# Training.


def test_every_trained_leaf_gets_a_finite_gradient_that_is_not_zero(case):
    for path, grad, leaf in pairs(case.at_trained["grads"], case.trained):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype), path
        assert bool(jnp.isfinite(grad).all()), path
        if not shifts_scores(path):
            assert (float(jnp.abs(grad).max()) > 0) != only_decays(path), path


def test_a_step_changes_all_that_is_trained_and_nothing_else_and_lowers_the_loss(case):
    before = numbers(case.given)
    stepped = case.at_trained["stepped"]
    for path, new, old in pairs(stepped, case.trained):
        assert new.dtype == old.dtype, path
        as_it_was = only_decays(path) or shifts_scores(path)
        assert as_it_was or not np.array_equal(new, old), path
    after = case.step(stepped, case.frozen, case.model.batch)
    assert float(after["loss"]) < float(case.at_trained["loss"])
    assert same(case.given, before)


def test_what_is_trained_and_what_is_frozen_share_no_array(case):
    trained = {id(leaf) for leaf in jax.tree.leaves(case.fresh)}
    assert not trained & {id(leaf) for leaf in jax.tree.leaves(case.frozen)}


def test_remat_gives_the_same_step(anew):
    step = step_of(anew.method, tiny(f"{anew.name} remat").forward)
    assert_close(
        step(anew.trained, anew.frozen, anew.model.batch),
        anew.at_trained,
    )


def test_bfloat16_computation(anew):
    step = step_of(anew.method, tiny(f"{anew.name} bf16").forward)
    got, want = (
        step(anew.trained, anew.frozen, anew.model.batch),
        anew.at_trained,
    )
    run = pj.adapt(anew.method.model(tiny(f"{anew.name} bf16").forward))
    params = anew.method.apply(anew.frozen, anew.trained)
    assert jax.eval_shape(run, params, anew.model.batch).dtype == jnp.bfloat16
    assert_close(got["out"], want["out"], 5e-2)
    found = []
    for path, grad, wanted in pairs(got["grads"], want["grads"]):
        assert grad.dtype == wanted.dtype, path
        if only_decays(path):
            continue
        found.append((np.ravel(grad), np.ravel(wanted)))
        assert cosine(*found[-1]) > 0.9, path
    assert cosine(*map(np.concatenate, zip(*found))) > 0.99


def test_bfloat16_parameters(mergeable):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), mergeable.model.params)
    frozen, trainable = mergeable.method.init(KEY, params)
    merged = mergeable.method.merge(frozen, moved(trainable))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    if mergeable.info.conformance.starts_as_base:
        assert_close(mergeable.method.merge(frozen, trainable), params, 1e-2)


def test_sixteen_bits_are_merged_in_float32_and_rounded_once():
    w = jax.random.normal(KEY, (64, 48), jnp.bfloat16)
    method = pj.lora(rank=4, targets="w")
    frozen, trainable = method.init(KEY, {"w": w})
    trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), trainable)
    own, scale = trainable["w"], method.apply(frozen, trainable)["w"].scale
    exact = np.asarray(w, np.float64) + scale * np.asarray(own["a"], np.float64).T @ np.asarray(own["b"])
    want = exact.astype(np.float32).astype(jnp.bfloat16)
    got = np.asarray(method.merge(frozen, trainable)["w"])
    assert (got != want).mean() < 1e-3  # twice rounded, about a tenth are others


# Merging.


def test_the_merged_model_is_the_adapted_model_and_the_base_is_still_there(case):
    before = numbers(case.given)
    if not case.info.mergeable:
        with pytest.raises(PeftError, match=rf"merge: {case.method.name} adds '"):
            case.method.merge(case.frozen, case.trained)
        return
    merged = case.method.merge(case.frozen, case.trained)
    for path, leaf, base in pairs(merged, case.model.params):
        assert (leaf.shape, leaf.dtype) == (base.shape, base.dtype), path
    assert same(case.given, before)
    assert_close(plain(case.name)(merged, case.model.batch), case.at_trained["out"])


def test_merging_again_gives_the_same_and_passes_the_safety_check(mergeable):
    merged = mergeable.method.merge(mergeable.frozen, mergeable.trained)
    assert same(mergeable.method.merge(mergeable.frozen, mergeable.trained, safe=True), merged)


def test_a_safe_merge_refuses_nan_and_leaves_everything_as_it_was(mergeable):
    poisoned = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), mergeable.trained)
    before = numbers(mergeable.given)
    with pytest.raises(PeftError, match=r"merge: parameter '.*' has values that are not finite"):
        mergeable.method.merge(mergeable.frozen, poisoned, safe=True)
    assert same(mergeable.given, before)


# Composition.


def test_an_adapter_comes_back_from_names_and_numpy_arrays(case):
    """What every file format stores; nothing of the base is among it."""
    stored = {path: np.array(leaf) for path, leaf in tree.named_leaves(case.trained).items()}
    assert len(stored) == len(jax.tree.leaves(case.trained))
    again = tree.map_named(lambda path, leaf: jnp.asarray(stored[path]), case.trained)
    assert jax.tree.structure(again) == jax.tree.structure(case.trained)
    assert same(again, case.trained)
    assert sum(array.nbytes for array in stored.values()) == tree.nbytes(case.trained)


def test_training_a_plain_parameter_beside_it(smallest):
    norm = NORM[smallest.name]
    method = pj.chain(smallest.method, pj.unfreeze([norm]))
    if norm in tree.named_leaves(smallest.fresh):
        with pytest.raises(PeftError, match=rf"'{norm}'"):
            method.init(KEY, smallest.model.params)
        return
    frozen, trainable = begun(method, smallest.model.params)
    assert set(trainable) == {smallest.method.name, "unfreeze"}
    trained = {**trainable, "unfreeze": {norm: jnp.full(8, 2.0)}}
    out = pj.adapt(method.model(smallest.model.forward))(method.apply(frozen, trained), smallest.model.batch)
    assert float(jnp.abs(out - smallest.at_fresh["out"]).max()) > 1e-3
    if smallest.info.mergeable:
        merged = method.merge(frozen, trained)
        np.testing.assert_array_equal(tree.named_leaves(merged)[norm], 2.0)
        assert_close(out, plain(smallest.name)(merged, smallest.model.batch))


def test_on_a_base_that_is_not_a_plain_array(anew):
    """One that no one trains, as a quantized one is."""
    targets = r".*(attention|feed_forward|words|up|down).*(kernel|embedding)"
    lora, own, batch = pj.lora(rank=2, targets=targets), anew.method, anew.model.batch
    base, adapter = lora.init(KEY, anew.model.params)
    adapter = moved(adapter)
    try:
        frozen, trainable = begun(own, lora.apply(base, adapter))
    except PeftError as error:
        if anew.info.quantized_base or not re.search(r"LowRank|earlier method", str(error)):
            raise
        return
    trained = moved(trainable)
    out = pj.adapt(own.model(anew.model.forward))(own.apply(frozen, trained), batch)
    if anew.info.mergeable:
        wanted = plain(anew.name)(own.merge(frozen, trained), batch)
    else:
        dense = own.apply(begun(own, lora.merge(base, adapter))[0], trained)
        wanted = own.model(anew.model.forward)(dense, batch)
    assert_close(out, wanted)
