"""A sliced model is the masked one, what is trained on it goes back, and a file says its sizes if it can."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import batch_of, make
from support import all_but_slow, noisy

import peftjax as pj
from peftjax.core import tree
from peftjax.weights.base import dense

FAMILIES = ("gemma2", "bert", "t5", "gpt_oss", "llama", "qwen3", "gpt2", "opt", "vit", "mixtral", "qwen3_moe")
QUICK = ("gpt_oss",)


def chosen(groups, keep, seed=0):
    """Units kept at random: others in each layer."""
    rng = np.random.default_rng(seed)
    scores = {name: jnp.asarray(rng.random(group.shape)) for name, group in groups.items()}
    return pj.prune.select(scores, keep)


def run(model, params, batch):
    return np.asarray(jax.jit(pj.adapt(lambda params, batch: model(params, batch)))(params, batch))


def cut(name, *kinds, keep=0.5):
    """A family's model, masked and sliced in groups of these kinds; all kinds by default."""
    model, params = make(name)
    groups = pj.prune.groups_of(model, params)
    groups = {key: group for key, group in groups.items() if not kinds or group.kind in kinds}
    kept = chosen(groups, keep)
    return model, params, groups, kept


@pytest.mark.parametrize("name", all_but_slow(FAMILIES, QUICK))
def test_a_sliced_model_is_the_masked_one(name):
    model, params, groups, kept = cut(name, keep=0.6)
    batch = batch_of(name)
    for key, group in groups.items():
        number = int(0.6 * group.count + 0.5)
        assert (kept[key].sum(-1) == number).all()
    small = pj.prune.sliced(model, params, groups, kept)
    zeros = pj.prune.masked(model, params, groups, kept)
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(lambda leaf: leaf.shape, small.model.shapes)
    assert tree.count(small.params) < tree.count(params)
    want = run(zeros.model, zeros.params, batch)
    np.testing.assert_allclose(run(small.model, small.params, batch), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "neuron", "expert", "layer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_so_it_is_for_each_axis_and_it_changes_the_model(name, kind):
    model, params, groups, kept = cut(name, kind)
    if not groups:
        pytest.skip(f"{name} has no {kind}")
    batch = batch_of(name)
    small = pj.prune.sliced(model, params, groups, kept)
    zeros = pj.prune.masked(model, params, groups, kept)
    want = run(zeros.model, zeros.params, batch)
    np.testing.assert_allclose(run(small.model, small.params, batch), want, atol=1e-5 * np.abs(want).max())
    assert np.abs(run(model, params, batch) - want).max() > 1e-3


@pytest.mark.parametrize("name", all_but_slow(FAMILIES, ("gemma2",)))
def test_all_of_a_model_is_the_model(name):
    model, params, groups, kept = cut(name, keep=1.0)
    small = pj.prune.sliced(model, params, groups, kept)
    jax.tree.map(np.testing.assert_array_equal, small.params, params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, small.model.shapes)


@pytest.mark.parametrize("name", all_but_slow(FAMILIES, ("mixtral",)))
def test_a_recovered_adapter_is_the_small_one_on_what_was_kept(name):
    model, params, groups, kept = cut(name, keep=0.6)
    small = pj.prune.sliced(model, params, groups, kept)
    method = pj.lora(rank=2, targets=r".*(attention|feed_forward)/(experts/)?(?!router).*kernel")
    frozen, trainable = method.init(jax.random.key(1), small.params)
    trainable = noisy(trainable)
    large, start = method.init(jax.random.key(2), params)
    recovered = pj.prune.recover(small.recipe, trainable)
    assert jax.tree.map(jnp.shape, recovered) == jax.tree.map(jnp.shape, start)

    def changes(frozen, trainable, params):
        adapted, before = tree.named_leaves(method.apply(frozen, trainable)), tree.named_leaves(params)
        return {path: dense(adapted[path]) - before[path] for path in trainable}

    own = changes(frozen, trainable, small.params)
    for path, change in changes(large, recovered, params).items():
        back = pj.prune.sliced(lambda params: params, tree.replace(params, {path: change}), groups, kept)
        np.testing.assert_allclose(tree.named_leaves(back.params)[path], own[path], atol=1e-5)
        np.testing.assert_allclose(np.abs(change).sum(), np.abs(own[path]).sum(), rtol=1e-4)  # zero elsewhere
    if name == "mixtral":
        return
    # The masked model with the recovered adapter is the small one with its own.
    zeros = pj.prune.masked(model, params, groups, kept)
    frozen_zeros, _ = method.init(jax.random.key(1), zeros.params)
    batch = batch_of(name)
    want = run(small.model, method.apply(frozen, trainable), batch)
    got = run(zeros.model, method.apply(frozen_zeros, recovered), batch)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


TOLD = ("llama", "gemma2", "qwen3", "t5", "mixtral", "gpt_oss", "qwen3_moe")


@pytest.mark.parametrize("name", all_but_slow(TOLD, ("gemma2",)))
def test_a_file_has_the_sizes_and_gives_the_model_back(name, tmp_path):
    model, params, groups, kept = cut(name, keep=0.6)
    small = pj.prune.sliced(model, params, groups, kept)
    pj.save(tmp_path, small.model, small.params)
    loaded, again = pj.load(tmp_path, head="none")
    jax.tree.map(np.testing.assert_array_equal, again, small.params)
    batch = batch_of(name)
    np.testing.assert_allclose(run(loaded, again, batch), run(small.model, small.params, batch), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "vit"])
def test_a_family_whose_file_has_no_width_of_a_head_says_so(name, tmp_path):
    model, params, groups, kept = cut(name, "neuron", "layer")
    small = pj.prune.sliced(model, params, groups, kept)
    pj.save(tmp_path, small.model, small.params)
    loaded, again = pj.load(tmp_path, head="none")
    jax.tree.map(np.testing.assert_array_equal, again, small.params)
    assert loaded.num_layers == small.model.num_layers == 2
    model, params, groups, kept = cut(name, "head")
    small = pj.prune.sliced(model, params, groups, kept)
    with pytest.raises(pj.PeftError, match="cannot say the sizes of this model"):
        pj.save(tmp_path / "heads", small.model, small.params)


def test_what_cannot_be_sliced_says_so():
    model, params = make("gemma2")
    groups = pj.prune.groups_of(model, params)
    scores = {name: jnp.arange(np.prod(group.shape)).reshape(group.shape) for name, group in groups.items()}
    uneven = pj.prune.select({"neurons": scores["neurons"]}, 0.5, scope="global")
    with pytest.raises(pj.PeftError, match="from 0 to 12 units of 'neurons'"):
        pj.prune.sliced(model, params, groups, uneven)
    with pytest.raises(pj.PeftError, match=r"no group 'neuron'; closest: 'neurons'"):
        pj.prune.masked(model, params, groups, {"neuron": uneven["neurons"]})
    with pytest.raises(pj.PeftError, match=r"the group's is \(3, 2\)"):
        pj.prune.sliced(model, params, groups, {"heads": jnp.ones(2, bool)})
    frozen, _ = pj.nf4(targets=["down"]).init(jax.random.key(0), params)
    with pytest.raises(pj.PeftError, match="slice the arrays, and code or adapt them after it"):
        pj.prune.sliced(model, frozen.params, groups, pj.prune.select({"neurons": scores["neurons"]}, 0.5))
    small = pj.prune.sliced(model, params, groups, pj.prune.select({"neurons": scores["neurons"]}, 0.5))
    _, trainable = pj.unfreeze(["down"]).init(jax.random.key(0), small.params)
    with pytest.raises(pj.PeftError, match=r"recover: 'blocks/feed_forward/down/kernel' was cut"):
        pj.prune.recover(small.recipe, trainable)
    columns = {"columns": dataclasses.replace(groups["neurons"], kind="filter")}
    both = dict.fromkeys(("neurons", "columns"), scores["neurons"])
    with pytest.raises(pj.PeftError, match="'columns' and 'neurons' both cut axis 2"):
        pj.prune.sliced(model, params, {**groups, **columns}, pj.prune.select(both, 0.5))
    moe, of_experts = make("mixtral")
    groups = {"experts": pj.prune.groups_of(moe, of_experts)["experts"]}
    with pytest.raises(pj.PeftError, match="1 experts are kept, and each token has 2"):
        pj.prune.sliced(moe, of_experts, groups, chosen(groups, 1))


@pytest.mark.slow
def test_gates_of_one_change_nothing_and_those_of_a_mask_are_the_mask():
    model, params = make("gemma2")
    batch = batch_of("gemma2")
    groups = pj.prune.groups_of(model, params)
    groups = {name: groups[name] for name in ("heads", "neurons")}
    kept = chosen(groups, 0.5)

    @jax.jit
    def out(gates):
        return pj.adapt(lambda params: model(params, batch))(pj.prune.gated(params, groups, gates))

    ones = {name: jnp.ones(group.shape) for name, group in groups.items()}
    np.testing.assert_array_equal(out(ones), run(model, params, batch))
    zeros = pj.prune.masked(model, params, groups, kept)
    got = out({name: own.astype(jnp.float32) for name, own in kept.items()})
    np.testing.assert_allclose(got, run(zeros.model, zeros.params, batch), atol=1e-5)
    gradients = jax.grad(lambda gates: jnp.sum(jnp.square(out(gates))))(ones)
    assert all(np.abs(own).min() > 0 for own in jax.tree.leaves(gradients))
