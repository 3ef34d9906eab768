"""What every method of the registry must do, on every tiny model; a new one is covered by its line there.

A method of blocks runs on backbones of the library, any other on models of other makers. One that finds
nothing to adapt in a model (token rows in an image model) is skipped there with its own error as the reason;
on the models of tokens none may be.

One program is compiled for each method and model. The quick tests are those on the smallest model, and of
LoRA on a transformer; what needs another program runs on the smallest model, and is quick for one method of
each kind of weight.
"""

import copy
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, all_but_slow, assert_close, example_of
from tiny_models import BACKBONES, CLASSIFIERS, EVERY_WEIGHT, MODELS, tiny

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.testing.comparisons import pairs
from peftjax.testing.methods import (
    METHOD_CHECKS,
    START_CHECKS,
    Case,
    begun,
    case_of,
    only_decays,
    step_of,
)
from peftjax.testing.model import moved

# A parameter of the smallest models that a method may leave as it is.
NORM = {"words": "norm/scale", "backbone": "head/norm/scale"}


def method_of(name: str) -> pj.Transform:
    """The method with its example's options, on every weight it can take."""
    method = example_of(name)
    own = [method.config, *method.config.get("methods", ())]
    if all(config.get("targets") != "all-linear" for config in own):
        return method
    return example_of(name, targets=EVERY_WEIGHT)


def further_models_of(name: str) -> tuple[str, ...]:
    """The names of the models to test that method on, but for the smallest."""
    if pj.METHODS[name].conformance.reads_classifier:
        return CLASSIFIERS[1:]
    return BACKBONES[1:] if pj.METHODS[name].of_blocks else MODELS


def made(method_name: str, model_name: str) -> Case | str:
    model, info = tiny(model_name), pj.METHODS[method_name]
    facts = {"mergeable": info.mergeable, "starts_as_base": info.conformance.starts_as_base}
    try:
        return case_of(method_of(method_name), model, **facts)
    except PeftError as error:
        if model_name == "experts" and re.search("experts|sinks", str(error)):
            return str(error)  # a method that knows none says so
        if (
            "words" in tree.named_leaves(model.params)
            or model_name in (*BACKBONES, *CLASSIFIERS)
            or "matched no parameter" not in str(error)
        ):
            raise
        return str(error)


def smallest_of(name: str) -> str:
    """The name of the smallest model for a method."""
    return "backbone" if pj.METHODS[name].of_blocks else "words"


ANEW = ("lora", "dora", "snell", "paca", "shira", "galore", "switchlora", "rows", "full")
"""One method of each kind of weight."""
STEPPED_ANEW = ("lora",)
"""Of those, the one whose whole step is compiled again in a quick test."""


def kind_of(name: str) -> tuple[str, ...]:
    """What a method is made of, as its file imports it: weights, builders, and the hooks it has."""
    text = Path(sys.modules[pj.METHODS[name].factory.__module__].__file__).read_text("utf-8")
    weights = set(re.findall(r"from peftjax\.weights\.(\w+) import", text)) - NO_WEIGHTS
    builders = re.findall(r"\b(low_rank|of_weights|of_parts|projected|quantized_base|rounded_base)\(", text)
    hooks = [hook for hook in ("Around", "advance", "replaces_base=True") if hook in text]
    return tuple(sorted({*weights, *builders, *hooks}))


NO_WEIGHTS = {"base", "canonical", "layout", "norms", "indexing", "sharding"}


def cases():
    """On all further models the first method with a weight, a builder or a hook, the others on one in turn.

    Methods of blocks that are made of none of these run on all. Long tests, but for LoRA's on layers that are
    scanned.
    """
    known: set[str] = set()
    for number, name in enumerate(pj.METHODS):
        models, parts = further_models_of(name), set(kind_of(name))
        if parts <= known and (parts or not pj.METHODS[name].of_blocks):
            models = (models[number % len(models)],)
        known |= parts
        for model in models:
            slow = [] if (name, model) == ("lora", "transformer") else [pytest.mark.slow]
            yield pytest.param((name, model), id=f"{name}-{model}", marks=slow)


# Of the whole file, so that all tests of a case run one after the other, and its programs go with it.
@pytest.fixture(scope="module", params=cases())
def case(request):
    found = made(*request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module", params=list(pj.METHODS))
def smallest(request):
    return made(request.param, smallest_of(request.param))


with_a_program_of_its_own = pytest.mark.parametrize("smallest", all_but_slow(pj.METHODS, ANEW), indirect=True)
"""By default of one method of each kind of weight."""


def with_a_step_of_its_own(turn: int):
    """Of the first method of each kind, and of a third of the others."""
    known: set[tuple[str, ...]] = set()
    names = []
    for number, name in enumerate(pj.METHODS):
        if (kind := kind_of(name)) not in known or number % 3 == turn:
            names.append(name)
        known |= {kind} - {()}
    return pytest.mark.parametrize("smallest", all_but_slow(names, STEPPED_ANEW), indirect=True)


def cosine(left, right):
    return np.vdot(left, right) / (np.linalg.norm(left) * np.linalg.norm(right))


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_on_further_models(case, check):
    check(case)


@pytest.mark.parametrize("check", [*METHOD_CHECKS, *START_CHECKS], ids=lambda check: check.__name__)
def test_on_the_smallest_model(smallest, check):
    check(smallest)


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


# Forward.


@with_a_program_of_its_own
def test_one_row_of_another_length(smallest):
    batch = jax.tree.map(lambda tokens: tokens[:1, :3], smallest.model.batch)
    run = pj.adapt(smallest.method.model(smallest.model.forward))
    out = jax.jit(run)(smallest.method.apply(smallest.frozen, smallest.trained), batch)
    whole = jax.eval_shape(smallest.model.forward, smallest.model.params, batch)
    assert out.shape == whole.shape
    if smallest.mergeable:
        merged = smallest.method.merge(smallest.frozen, smallest.trained)
        assert_close(out, smallest.model.compiled(merged, batch))


# Training.


@with_a_step_of_its_own(0)
def test_remat_gives_the_same_step(smallest):
    step = step_of(smallest.method, tiny(f"{smallest.model.name} remat").forward)
    got = step(smallest.trained, smallest.frozen, smallest.model.batch)
    assert_close(got, smallest.at_trained, 2e-5)  # a recomputed sum has another order


@with_a_step_of_its_own(1)
def test_bfloat16_computation(smallest):
    step = step_of(smallest.method, tiny(f"{smallest.model.name} bf16").forward)
    got, want = (
        step(smallest.trained, smallest.frozen, smallest.model.batch),
        smallest.at_trained,
    )
    run = pj.adapt(smallest.method.model(tiny(f"{smallest.model.name} bf16").forward))
    params = smallest.method.apply(smallest.frozen, smallest.trained)
    assert jax.eval_shape(run, params, smallest.model.batch).dtype == jnp.bfloat16
    assert_close(got["out"], want["out"], 5e-2)
    found = []
    for path, grad, wanted in pairs(got["grads"], want["grads"]):
        assert grad.dtype == wanted.dtype, path
        if only_decays(path):
            continue
        found.append((np.ravel(grad), np.ravel(wanted)))
        # A single number, in which all of a weight cancels, has a direction with the others alone.
        assert grad.size == 1 or cosine(*found[-1]) > 0.9, path
    assert cosine(*map(np.concatenate, zip(*found))) > 0.99


@with_a_program_of_its_own
def test_bfloat16_parameters(smallest):
    if not smallest.mergeable:
        pytest.skip("not merged")
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), smallest.model.params)
    frozen, trainable = smallest.method.init(KEY, params)
    merged = smallest.method.merge(frozen, moved(trainable))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    if smallest.starts_as_base:
        assert_close(smallest.method.merge(frozen, trainable), params, 1e-2)


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


# Composition.


@with_a_program_of_its_own
def test_training_a_plain_parameter_beside_it(smallest):
    norm = NORM[smallest.model.name]
    method = pj.chain(smallest.method, pj.unfreeze([norm]))
    if norm in tree.named_leaves(smallest.fresh):
        with pytest.raises(PeftError, match=rf"'{norm}'"):
            method.init(KEY, smallest.model.params)
        return
    frozen, trainable = begun(method, smallest.model.params)
    assert set(trainable) == {smallest.method.name, "unfreeze"}
    trained = {**trainable, "unfreeze": {norm: jnp.full(8, 2.0)}}
    run = jax.jit(pj.adapt(method.model(smallest.model.forward)))
    out = run(method.apply(frozen, trained), smallest.model.batch)
    assert np.abs(np.asarray(out) - smallest.at_fresh["out"]).max() > 1e-3
    if smallest.mergeable:
        merged = method.merge(frozen, trained)
        np.testing.assert_array_equal(tree.named_leaves(merged)[norm], 2.0)
        assert_close(out, smallest.model.compiled(merged, smallest.model.batch))


@pytest.mark.parametrize("beneath", [{"name": "lora", "rank": 2}, {"name": "nf4"}], ids=lambda b: b["name"])
@with_a_step_of_its_own(2)
def test_on_a_base_that_is_not_a_plain_array(smallest, beneath, request):
    """Of weights that no one trains, or of codes."""
    targets = r".*(attention|feed_forward|words|up|down).*(kernel|embedding)"
    lower, own, batch = pj.build({**beneath, "targets": targets}), smallest.method, smallest.model.batch
    base, adapter = lower.init(KEY, smallest.model.params)
    adapter = moved(adapter)
    try:
        frozen, trainable = begun(own, lower.apply(base, adapter))
    except PeftError as error:
        info = pj.METHODS[request.node.callspec.params["smallest"]]
        if info.quantized_base or not re.search(r"LowRank|Quantized|coded already|earlier", str(error)):
            raise
        return
    trained = moved(trainable)
    out = jax.jit(pj.adapt(own.model(smallest.model.forward)))(own.apply(frozen, trained), batch)
    if smallest.mergeable:
        wanted = smallest.model.compiled(own.merge(frozen, trained), batch)
    else:
        dense = own.apply(begun(own, lower.merge(base, adapter))[0], trained)
        wanted = jax.jit(pj.adapt(own.model(smallest.model.forward)))(dense, batch)
    assert_close(out, wanted)
