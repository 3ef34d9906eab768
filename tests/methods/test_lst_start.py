"""Where a side network starts: structural pruning, by Fisher information or magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ladders import backbone
from support import KEY, assert_close, normal, quick_at

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods.side._lst_pruning import kept_count, largest

R = 2


def scores_of(params):
    noise = np.random.default_rng(0)
    return {path: noise.uniform(size=leaf.shape) for path, leaf in tree.named_leaves(params).items()}


def best(scores):
    """The better half, by sorting."""
    return sorted(sorted(range(len(scores)), key=lambda n: -scores[n])[: len(scores) // R])


def pruned_by_hand(params, scores, stack, encoded=None):
    """Every kernel and norm of a stack of T5 by its path, in numpy, and the last kept set."""
    kept = best(scores["embed/word/embedding"].sum(0))
    leaves, made = tree.named_leaves(params), {}
    for layer in range(len(leaves[f"{stack}blocks/attention_norm/scale"])):
        weight = lambda path: np.asarray(leaves[f"{stack}blocks/{path}"])[layer]  # noqa: B023
        score = lambda path: scores[f"{stack}blocks/{path}"][layer]  # noqa: B023

        def cut(path, inputs, outputs):
            made[layer, f"{path}/kernel"] = weight(f"{path}/kernel")[np.ix_(inputs, outputs)]  # noqa: B023

        for branch in ("attention", "cross_attention") if encoded is not None else ("attention",):
            made[layer, f"{branch}_norm/scale"] = weight(f"{branch}_norm/scale")[kept]
            inputs = dict(zip(("query", "key", "value"), (kept, kept, kept)))
            if branch == "cross_attention":
                inputs |= {"key": encoded, "value": encoded}
            factors = [score(f"{branch}/{name}/kernel")[rows] for name, rows in inputs.items()]
            outputs = best((factors[0] * factors[1] * factors[2]).sum(0))
            for name, rows in inputs.items():
                cut(f"{branch}/{name}", rows, outputs)
            kept = best(score(f"{branch}/output/kernel")[outputs].sum(0))
            cut(f"{branch}/output", outputs, kept)
        made[layer, "feed_forward_norm/scale"] = weight("feed_forward_norm/scale")[kept]
        inner = best(score("feed_forward/up/kernel")[kept].sum(0))
        cut("feed_forward/up", kept, inner)
        kept = best(score("feed_forward/down/kernel")[inner].sum(0))
        cut("feed_forward/down", inner, kept)
    return made, kept


@pytest.mark.slow
def test_an_encoder_decoder_is_pruned_in_the_order_of_its_computation():
    """Dropped layers, too, hand a kept set on."""
    params = backbone("t5").params
    scores = scores_of(params)
    method = pj.lst(reduction=R, side_layers=[1], init="fisher", scores=scores)
    _, trainable = jax.jit(method.init)(KEY, params)
    encoder, last = pruned_by_hand(params, scores, "encoder/")
    decoder, end = pruned_by_hand(params, scores, "", encoded=last)
    for stack, made in (("encoder", encoder), ("blocks", decoder)):
        found = tree.named_leaves(trainable[stack]["layers"])
        wanted = {path: leaf for (layer, path), leaf in made.items() if layer == 1}
        assert found.keys() == wanted.keys()
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf[0], wanted[path], err_msg=path)
    np.testing.assert_array_equal(
        trainable["encoder"]["norm"]["scale"], params["encoder"]["head"]["norm"]["scale"][np.array(last)]
    )
    np.testing.assert_array_equal(
        trainable["blocks"]["norm"]["scale"], params["head"]["norm"]["scale"][np.array(end)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gemma", "fused", "t5"])
def test_a_network_of_the_whole_width_is_the_backbone(name):
    params = backbone(name).params
    _, trainable = jax.jit(pj.lst(reduction=1).init)(KEY, params)
    for stack, side in trainable.items():
        part = params if stack == "blocks" else params["encoder"]
        jax.tree.map(np.testing.assert_array_equal, side["layers"], part["blocks"])
        assert side.get("norm") is None or assert_close(side["norm"], part["head"]["norm"]) is None


@pytest.mark.parametrize(("name", "after"), quick_at([("bert", True), ("vit", False), ("fused", False)], 0))
def test_a_norm_is_cut_where_it_stands(name, after):
    """Its scale marks the residual numbers: those before the branch of a pre-norm block, else those after."""
    params = backbone(name).params
    marked = jnp.tile(jnp.arange(16.0), (3, 1))
    blocks = {**params["blocks"], "attention_norm": {**params["blocks"]["attention_norm"], "scale": marked}}
    blocks["attention"] = {**blocks["attention"], "output": dict(blocks["attention"]["output"])}
    blocks["attention"]["output"]["bias"] = marked
    _, trainable = jax.jit(pj.lst(reduction=R).init)(KEY, {**params, "blocks": blocks})
    layers = trainable["blocks"]["layers"]
    scale, bias = layers["attention_norm"]["scale"], layers["attention"]["output"]["bias"]
    assert np.array_equal(scale, bias) == after
    assert all((np.diff(kept, axis=1) > 0).all() for kept in (scale, bias))


def test_rotary_heads_keep_every_second_pair():
    params = backbone("llama").params
    marked = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.arange(leaf.shape[-1]), leaf.shape), params["blocks"]
    )
    _, trainable = jax.jit(pj.lst(reduction=R).init)(KEY, {**params, "blocks": marked})
    attention = trainable["blocks"]["layers"]["attention"]
    # Heads of 4 are the pairs (0, 2) and (1, 3).
    for name, heads in (("query", 4), ("key", 2), ("value", 2)):
        wanted = [4 * head + place for head in range(heads) for place in (0, 2)]
        np.testing.assert_array_equal(attention[name]["kernel"][0, 0], wanted)


def test_counts_and_ties():
    assert [kept_count(n, r) for n, r in ((768, 8), (10, 3), (7, 2), (5, 1))] == [96, 3, 3, 5]
    np.testing.assert_array_equal(largest(jnp.array([1.0, 3.0, 1.0, 3.0, 1.0, 0.0]), 2), [0, 1, 3])


@pytest.mark.slow
def test_scores_too_small_for_a_product_still_rank():
    params = backbone("bert").params
    scores = scores_of(params)
    tiny = {path: 1e-20 * score for path, score in scores.items()}
    made = [
        jax.jit(pj.lst(reduction=R, init="fisher", scores=own).init)(KEY, params)[1] for own in (scores, tiny)
    ]
    jax.tree.map(np.testing.assert_array_equal, *made)


@pytest.mark.slow
def test_random_blocks_have_the_pruned_norms():
    params = backbone("bert").params
    (_, random), (_, pruned) = (
        jax.jit(pj.lst(reduction=R, init=init).init)(KEY, params) for init in ("random", "magnitude")
    )
    layers = random["blocks"]["layers"]
    assert_close(layers["attention_norm"], pruned["blocks"]["layers"]["attention_norm"])
    kernel = layers["feed_forward"]["up"]["kernel"]
    assert 0.9 * 8**-0.5 < float(jnp.abs(kernel).max()) <= 8**-0.5
    assert not np.array_equal(kernel[0], kernel[1])
    assert not layers["feed_forward"]["up"]["bias"].any()


# Fisher information.

X = normal(KEY, (6, 4))
PARAMS = {"up": {"kernel": normal(jax.random.key(1), (4, 3)), "bias": jnp.zeros(3)}}


def loss(params, x):
    return jnp.mean(jnp.sin(x @ params["up"]["kernel"] + params["up"]["bias"]).sum(-1))


@pytest.mark.parametrize("per_example", [True, False])
def test_the_information_is_the_sum_of_squared_gradients(per_example):
    parts = [X[n : n + 1] for n in range(6)] if per_example else [X[:3], X[3:]]
    wanted = sum(jnp.square(jax.grad(loss)(PARAMS, part)["up"]["kernel"]) for part in parts)
    found = pj.calibrate.fisher_information(loss, PARAMS, [X[:3], X[3:]], per_example=per_example)
    assert found.keys() == {"up/kernel"}
    assert_close(found["up/kernel"], wanted)


@pytest.mark.slow
def test_it_is_what_a_side_network_asks_for():
    tiny = backbone("t5")

    def loss(params, batch):
        return jnp.mean(jnp.sin(tiny.forward(params, batch).dense()))

    scores = pj.calibrate.fisher_information(loss, tiny.params, [tiny.batch])
    method = pj.lst(reduction=R, init="fisher", scores=scores)
    _, trainable = jax.jit(method.init)(KEY, tiny.params)
    _, other = jax.jit(pj.lst(reduction=R).init)(KEY, tiny.params)
    kernel = lambda t: t["blocks"]["layers"]["feed_forward"]["up"]["kernel"]
    assert kernel(trainable).shape == kernel(other).shape
    assert not np.array_equal(kernel(trainable), kernel(other))


def test_no_batch_is_an_error():
    with pytest.raises(PeftError, match="fisher_information: there is no batch"):
        pj.calibrate.fisher_information(loss, PARAMS, [])


def test_a_reduction_beyond_the_width_is_refused():
    with pytest.raises(PeftError, match="lst: reduction 1000000 leaves nothing of a width of"):
        pj.lst(reduction=1_000_000).init(KEY, backbone("llama").params)
