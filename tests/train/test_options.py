"""From options to a method, and what becomes of a new head."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.train.method import make_method
from peftjax.train.new_head import start_at_probe, with_new_head
from peftjax.train.open import open_data
from peftjax.train.options import DataOptions, MethodOptions
from peftjax.transform.registry import METHODS, build, describe

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
    labels=("a", "b", "c"),
)
WEIGHTS = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}


@pytest.fixture(scope="module", params=["mean_classifier", "classifier"])
def model_and_params(request):
    model = bert(CONFIG, head=request.param)
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("all-linear",), "all-linear"),
        (("query", "value"), ["query", "value"]),
        (("query",), ["query"]),
        ((".*/(query|value)",), ".*/(query|value)"),
    ],
)
def test_targets(given, wanted):
    assert make_method(MethodOptions(targets=given)).config["targets"] == wanted


@pytest.mark.parametrize(
    ("given", "wanted"), [("5e-4", 5e-4), ("1E+1", 10.0), (".5e-3", 5e-4), ("0.25", 0.25)]
)
def test_numbers_with_an_exponent_are_numbers(given, wanted):
    made = make_method(MethodOptions(method="sara", method_options=(f"penalty={given}",)), steps=300)
    assert made.config["penalty"] == wanted


def test_options_that_follow_from_the_steps_of_a_run_yield_to_those_given():
    assert make_method(MethodOptions(method="snella"), steps=300).config["total_steps"] == 300
    assert make_method(MethodOptions(method="sara"), steps=300).config["reselect_at"] == 150
    given = MethodOptions(method="snella", method_options=("total_steps=200",))
    assert make_method(given, steps=300).config["total_steps"] == 200


def test_methods_are_chained_and_each_takes_the_options_it_has():
    options = MethodOptions(method="lora+pfeiffer", rank=2, dropout=0.1, method_options=("size=3",))
    lora, pfeiffer = make_method(options).config["methods"]
    assert (lora["name"], lora["rank"], lora["dropout"]) == ("lora", 2, 0.1)
    assert (pfeiffer["name"], pfeiffer["size"], pfeiffer["dropout"]) == ("pfeiffer", 3, 0.1)
    with pytest.raises(PeftError, match="none of lora, pfeiffer has an option 'ranc'"):
        make_method(MethodOptions(method="lora+pfeiffer", method_options=("ranc=3",)))
    with pytest.raises(PeftError, match="no method is called 'lroa'; closest: 'road', 'lora'"):
        make_method(MethodOptions(method="pfeiffer+lroa"))


def test_what_trains_nothing_goes_beside_a_method():
    options = MethodOptions(method="coded_residuals+lora", rank=2, method_options=("attention=8",))
    coded, lora = make_method(options).config["methods"]
    assert (coded["name"], coded["attention"], lora["name"], lora["rank"]) == (
        "coded_residuals",
        8,
        "lora",
        2,
    )


def test_variants_of_lora_take_its_options_in_a_chain():
    options = MethodOptions(method="coded_residuals+dora", rank=4, alpha=2.0, targets=("query",))
    coded, dora = make_method(options).config["methods"]
    assert (coded["name"], dora["name"]) == ("coded_residuals", "dora")
    assert (dora["rank"], dora["alpha"], dora["targets"]) == (4, 2.0, ["query"])
    with pytest.raises(PeftError, match="none of dora, pissa has an option 'ratio'"):
        make_method(MethodOptions(method="dora+pissa", method_options=("ratio=3",)))


def test_method_options_keep_their_types():
    options = MethodOptions(
        method_options=("init=gaussian", "rslora=true", "layers=[0, 1]"), rank=4, alpha=2.0
    )
    config = make_method(options).config
    assert (config["init"], config["rslora"], config["layers"], config["rank"]) == (
        "gaussian",
        True,
        [0, 1],
        4,
    )


def test_a_new_head_is_trained_whatever_the_method(model_and_params):
    model, params = model_and_params
    head = {"head/classifier/kernel", "head/classifier/bias"}
    for method in (pj.lora(rank=2), pj.full(), pj.bitfit(), pj.lora(rank=2, bias="all")):
        method = with_new_head(method, model, params)
        frozen, _ = method.init(jax.random.key(0), params)
        holes = {
            path for path, leaf in tree.named_leaves(frozen.params).items() if isinstance(leaf, tree.Hole)
        }
        assert head <= holes


def test_a_head_on_the_probes_features_starts_from_it(model_and_params):
    model, params = model_and_params
    method = with_new_head(pj.lora(rank=2), model, params)
    started = start_at_probe(method, model, params, WEIGHTS)["head"]["classifier"]
    wanted = WEIGHTS if model.head_name == "mean_classifier" else params["head"]["classifier"]
    assert all(bool((started[name] == wanted[name]).all()) for name in WEIGHTS)


def test_a_head_that_is_adapted_keeps_what_the_seed_drew(model_and_params):
    model, params = model_and_params
    method = pj.lora(rank=2, targets=["classifier"])
    started = start_at_probe(method, model, params, WEIGHTS)
    assert started["head"]["classifier"]["kernel"] is params["head"]["classifier"]["kernel"]


def test_options_without_a_use_are_refused():
    with pytest.raises(PeftError, match="takes no text_column"):
        open_data(DataOptions(text_column="body"))


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("lora", "rank=x", "lora: option 'rank': Expected `int`, got `str` ('x')"),
        ("lora", "rank=true", "lora: option 'rank': Expected `int`, got `bool` (True)"),
        (
            "lora",
            "rank=1000000000",
            "lora: option 'rank' has 1000000000; whole numbers are at most 1,000,000",
        ),
        (
            "lora",
            "init=gauss",
            "lora: option 'init' is 'gauss', and can be 'uniform', 'gaussian', 'orthogonal', 'zero_a'",
        ),
        (
            "lora",
            "rank_pattern={up: 0.5}",
            "Expected `int`, got `float` ({'up': 0.5})",
        ),
        ("lora", "alpha=.inf", "the method's option 'alpha' is inf"),
        ("lora", "alpha_pattern={up: .nan}", "lora: option 'alpha_pattern' has nan; numbers are finite"),
        ("dora", "targets=3", "dora: option 'targets': Expected `str | array`, got `int` (3)"),
        ("rows", "targets=up", "rows: the option 'indices' is missing"),
        ("lst", "side=3", "lst: option 'side': Expected `object | null`, got `int` (3)"),
        ("unipt", "factor=[2]", "unipt: option 'factor': Expected `int`, got `array` ([2])"),
    ],
)
def test_an_option_that_cannot_be_says_what_it_is_and_can_be(method, option, message):
    with pytest.raises(PeftError, match=re.escape(message)):
        make_method(MethodOptions(method=method, method_options=(option,)))


def test_chains_of_files_are_lists_of_methods_that_end():
    for methods, message in ((3, "Expected `array`"), ([3], "Expected `object`")):
        with pytest.raises(PeftError, match=message):
            build({"name": "chain", "methods": methods})
    config = {"name": "lora"}
    for _ in range(100):
        config = {"name": "chain", "methods": [config]}
    with pytest.raises(PeftError, match="nests too deeply"):
        build(config)


@pytest.mark.parametrize("info", METHODS.values(), ids=lambda info: info.name)
def test_what_describes_a_method_makes_it_again(info):
    method = info.factory(**info.conformance.example)
    assert build(json.loads(json.dumps(describe(method)))).config == method.config
