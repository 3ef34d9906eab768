"""Path names, target rules, partition and join."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from peftjax.core import naming, tree
from peftjax.core import targets as chosen
from peftjax.core.errors import PeftError
from peftjax.core.targets import pattern_value


def matrices(*paths):
    params = {}
    for path in paths:
        *modules, name = path.split("/")
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = jnp.zeros((4, 4))
    return params


MODEL = matrices(
    "embed/word/embedding",
    "layers/0/query/kernel",
    "layers/0/up/kernel",
    "layers/1/query/kernel",
    "layers/1/up/kernel",
    "layers/1/my_head/kernel",
    "head/kernel",
)
MODEL["layers"]["1"]["conv_in"] = {"kernel": jnp.zeros((3, 4, 4))}  # two axes would be a linear layer


def select(wanted, **options):
    return chosen.select(MODEL, wanted, caller="test", **options)


def test_path_names_in_every_kind_of_tree():
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    assert list(tree.named_leaves({"m": linear})) == ["m/weight", "m/bias"]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert sorted(tree.named_leaves(state)) == ["bias", "kernel"]
    assert list(tree.named_leaves([{"a": (jnp.ones(1),)}])) == ["0/a/0"]


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (r"layers/\d/query/kernel", ["layers/0/query/kernel", "layers/1/query/kernel"]),
        (r".*/query", ["layers/0/query/kernel", "layers/1/query/kernel"]),
        (["query"], ["layers/0/query/kernel", "layers/1/query/kernel"]),
        (["0/query", "layers/1/up/kernel"], ["layers/0/query/kernel", "layers/1/up/kernel"]),
        (["head"], ["head/kernel"]),
        (["word"], ["embed/word/embedding"]),
        (
            "all-linear",
            [
                "layers/0/query/kernel",
                "layers/0/up/kernel",
                "layers/1/query/kernel",
                "layers/1/up/kernel",
                "layers/1/my_head/kernel",
            ],
        ),
    ],
)
def test_targets(targets, wanted):
    assert sorted(select(targets)) == sorted(wanted)


def test_a_regex_must_match_the_whole_name():
    with pytest.raises(PeftError, match="matched no parameter"):
        select("query")


def test_exclude_wins():
    assert select(["query", "up"], exclude=["layers/0/query", "up"]) == ["layers/1/query/kernel"]


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["query", "upp"], {}, r"target 'upp' matched no parameter; closest: 'layers/\d/up'"),
        ("q_porj", {}, "closest"),
        (["query"], {"exclude": ["query"]}, "removes every parameter"),
        (["query"], {"exclude": ["up"]}, "matched none of the targets"),
    ],
)
def test_wrong_targets_name_the_part_and_the_nearest(targets, options, message):
    with pytest.raises(PeftError, match=message):
        select(targets, **options)


@pytest.mark.parametrize(
    ("path", "pattern", "wanted"),
    [
        ("layers/0/query/kernel", None, 0),
        ("layers_11/mlp/kernel", None, 11),
        ("layers/2/experts/5/up/kernel", None, 2),
        ("stages/1/blocks/3/up/kernel", "blocks", 3),
        ("embed/word/embedding", None, None),
    ],
)
def test_layer_index(path, pattern, wanted):
    assert naming.layer_index(path, pattern) == wanted


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        ({"query": 3}, 3),
        ({"0/query": 3}, 3),
        ({"^layers/0/query": 3}, 3),
        ({"^query": 3}, 8),
        ({"uery": 3}, 8),
        ({"query": 3, "0/query": 5}, 3),
        ({r"layers/\d+/query/kernel": 4}, 4),
    ],
)
def test_rank_patterns_match_the_end_of_a_name_and_the_first_wins(patterns, wanted):
    assert pattern_value("layers/0/query/kernel", patterns, 8) == wanted


def test_partition_and_join_are_inverse():
    taken, rest = tree.partition(MODEL, ["head/kernel", "layers/0/up/kernel"])
    assert sorted(taken) == ["head/kernel", "layers/0/up/kernel"]
    assert tree.count(rest) == tree.count(MODEL) - 32
    back = tree.join(rest, taken)
    assert jax.tree.structure(back) == jax.tree.structure(MODEL)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(MODEL)))


def test_join_refuses_what_was_not_taken():
    _, rest = tree.partition(MODEL, ["head/kernel"])
    with pytest.raises(PeftError, match="was not taken out"):
        tree.join(rest, {"layers/0/up/kernel": jnp.zeros(())})


def test_holes_pass_through_jit():
    taken, rest = tree.partition(MODEL, ["head/kernel"])
    total = jax.jit(lambda rest, taken: sum(jnp.sum(x) for x in jax.tree.leaves(tree.join(rest, taken))))
    assert float(total(rest, {path: leaf + 1 for path, leaf in taken.items()})) == 16.0


def test_counting():
    params = {"a": jnp.zeros((3, 4), jnp.bfloat16), "b": jnp.zeros(5)}
    assert tree.count(params) == 17
    assert tree.nbytes(params) == 3 * 4 * 2 + 5 * 4


def test_a_parameter_called_value_keeps_its_name():
    class Attention(eqx.Module):
        query: jax.Array
        value: jax.Array

    w = jnp.zeros((4, 4))
    for params in ({"attn": {"query": w, "value": w}}, {"attn": Attention(w, w)}):
        assert list(tree.named_leaves(params)) == ["attn/query", "attn/value"]
        assert chosen.select(params, ["query", "value"], caller="test") == ["attn/query", "attn/value"]
    assert list(tree.named_leaves({"attn": {"value": w}})) == ["attn/value"]
    assert list(tree.named_leaves({"value": {"value": w}})) == ["value/value"]
    state = nnx.State({"value": nnx.Param(w), "query": nnx.Param(w)})
    assert sorted(tree.named_leaves(state)) == ["query", "value"]


def test_the_slot_of_a_plain_parameter_has_the_name_of_the_parameter():
    trainable = {"up/bias": {"value": jnp.zeros(4)}, "bias": {"value": jnp.zeros(4)}}
    assert sorted(tree.named_leaves(trainable)) == ["bias", "up/bias"]


@pytest.mark.parametrize("params", [{"a/b": 1.0, "a": {"b": 2.0}}, {"a": {"1": 1.0}, "a/1": 2.0}])
def test_two_leaves_of_one_name_are_an_error_that_names_both(params):
    with pytest.raises(PeftError, match=r"two leaves .* 'a/.'.*\['a'\]"):
        tree.named_leaves(params)


def test_what_is_no_parameter_is_not_selected_and_an_error_says_why():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)))
    others = tree.not_parameters(state)
    assert sorted(others) == ["norm/mean", "norm/var"]
    with pytest.raises(PeftError, match=r"'norm/mean' cannot be trained, it is a BatchStat"):
        chosen.select(state, ["mean"], caller="test", eligible=lambda *_: True)
    flax = {"params": {"w": jnp.ones((2, 2))}, "batch_stats": {"mean": jnp.ones((2, 2))}}
    assert list(tree.not_parameters(flax)) == ["batch_stats/mean"]
    module = {"w": jnp.ones((2, 2)), "act": jax.nn.relu, "rate": 0.5}
    assert sorted(tree.not_parameters(module)) == ["act", "rate"]
    assert tree.count(module) == 4
    with pytest.raises(PeftError, match="'act' cannot be trained, it is no array"):
        chosen.select(module, ["act"], caller="test")


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64])
@pytest.mark.parametrize("targets", [["w"], ".*w"])
def test_a_target_that_is_not_floating_is_named_with_its_dtype(dtype, targets):
    params = {"layer": {"w": jnp.ones((4, 4), dtype)}, "u": jnp.ones((4, 4))}
    with pytest.raises(PeftError, match=f"'layer/w' cannot be trained, it is {jnp.dtype(dtype)}"):
        chosen.select(params, targets, caller="test")


def test_biases_in_the_words_of_every_library():
    w, v = jnp.ones((4, 4)), jnp.ones(4)
    haiku = {"linear": {"w": w, "b": v}, "layer_norm": {"scale": v, "offset": v}, "lora": {"a": w, "b": w}}
    assert tree.biases(haiku) == ["layer_norm/offset", "linear/b"]
    assert tree.biases({"up": {"kernel": w, "bias": v}}) == ["up/bias"]


def test_all_linear_leaves_out_the_output_layer_and_nothing_for_a_name_further_in():
    inside = ["attn/heads/0/q", "converter/kernel", "a", "b", "scale", "layers/0/attn/score/kernel"]
    inside += ["attention/logits/kernel", "blocks/3/head/kernel", "conv_proj/kernel"]
    params = matrices(*inside, "lm_head/kernel", "params/head/kernel", "heads/0/kernel")
    assert sorted(chosen.select(params, "all-linear", caller="test")) == sorted(inside)
    assert naming.why_not_linear("lm_head/kernel", jnp.zeros((4, 4))) == "in the output layer 'lm_head'"


def test_stacked_biases_and_scales_are_no_matrices():
    params = matrices("layers/norm/scale", "h/norm/scale", "h/mlp/b") | {"up": {"kernel": jnp.zeros((4, 4))}}
    params["h"]["mlp"]["w"] = jnp.zeros((4, 4, 4))
    assert chosen.select(params, "all-linear", caller="test") == ["h/mlp/w", "up/kernel"]
