"""Scores against their formulas, selections against counts, and the update that makes up for what is gone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import batch_of, make
from support import noisy, normal

import peftjax as pj
from peftjax.core import tree
from peftjax.parallel import make_mesh, shard
from peftjax.prune.group import Group, Member
from peftjax.prune.obs import _matrix

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(2, 8, 6)), jnp.float32)
DOWN = jnp.asarray(RNG.normal(size=(2, 6, 8)), jnp.float32)
PARAMS = {"blocks": {"up": {"kernel": W}, "down": {"kernel": DOWN}}}
X = RNG.normal(size=(2, 50, 8)) * np.linspace(0.1, 2, 8) + 0.3
MEANS = {"blocks/up/kernel": jnp.asarray(X.mean(1), jnp.float32)}
MOMENTS = {"blocks/up/kernel": jnp.asarray(np.einsum("lti,ltj->lij", X, X) / 50, jnp.float32)}
GROUPS = {
    "inner": Group(
        "neuron", (Member("blocks/up/kernel", 2), Member("blocks/down/kernel", 1, reads=True)), 6, (2,)
    ),
    "pairs": Group("head", (Member("blocks/up/kernel", 2, block=1, repeat=2),), 3, (2,)),
}
UP = "blocks/up/kernel"


def test_scores_of_entries_are_their_formulas():
    w = np.asarray(W)
    np.testing.assert_array_equal(pj.prune.magnitude(PARAMS, targets=["up"])[UP], np.abs(w))
    lengths = np.sqrt((X**2).mean(1))[:, :, None]
    np.testing.assert_allclose(pj.prune.wanda(PARAMS, MOMENTS)[UP], np.abs(w) * lengths, rtol=1e-5)
    gradient, fisher = RNG.normal(size=w.shape), RNG.random(w.shape)
    scored = pj.prune.taylor(PARAMS, {UP: gradient})[UP]
    np.testing.assert_allclose(scored, np.abs(gradient * w), rtol=1e-5)
    scored = pj.prune.taylor(PARAMS, {UP: gradient}, fisher={UP: fisher})[UP]
    np.testing.assert_allclose(scored, np.abs(gradient * w - fisher * w * w / 2), rtol=1e-4, atol=1e-6)
    with pytest.raises(pj.PeftError, match="no parameter is called 'up/kernel'"):
        pj.prune.wanda(PARAMS, {"up/kernel": MOMENTS[UP]})


def test_beta_rank_is_the_spread_of_outputs_over_that_of_inputs():
    ours = pj.prune.beta_rank(PARAMS, MEANS, MOMENTS)[UP]
    y = np.einsum("lti,lio->lto", X, np.asarray(W))
    want = np.abs(W) * y.std(1)[:, None] / X.std((1, 2))[:, None, None]
    np.testing.assert_allclose(ours, want, rtol=1e-4)
    doubled = {UP: 4 * MOMENTS[UP]}
    np.testing.assert_allclose(pj.prune.beta_rank(PARAMS, {UP: 2 * MEANS[UP]}, doubled)[UP], ours, rtol=1e-4)
    still = pj.prune.beta_rank(PARAMS, {UP: jnp.zeros((2, 8))}, {UP: jnp.zeros((2, 8, 8))})[UP]
    np.testing.assert_array_equal(still, 0)  # and no NaN


def test_gradients_from_factors_are_what_a_step_takes_from_their_product():
    params = {"up": {"kernel": W[0]}}
    method = pj.lora(rank=2)
    frozen, trainable = method.init(jax.random.key(0), params)
    gradients = noisy(trainable, scale=0.3)
    found = pj.prune.lora_gradients(params, trainable, gradients)["up/kernel"]
    a, b = (np.asarray(trainable["up/kernel"][name]) for name in ("a", "b"))
    g_a, g_b = (np.asarray(gradients["up/kernel"][name]) for name in ("a", "b"))
    np.testing.assert_allclose(found, a.T @ b - (a - g_a).T @ (b - g_b), atol=1e-6)
    assert np.abs(found).max() > 0.01  # at the start too, where b is zero
    scores = pj.prune.taylor(method.apply(frozen, trainable), {"up/kernel": found})
    np.testing.assert_allclose(scores["up/kernel"], np.abs(found * W[0]), rtol=1e-5)
    none = jax.tree.map(jnp.zeros_like, gradients)
    assert not pj.prune.lora_gradients(params, trainable, none)["up/kernel"].any()
    with pytest.raises(pj.PeftError, match="no weight has factors"):
        pj.prune.lora_gradients(params, {"up/kernel": {"value": W[0]}}, {})


def test_units_are_scored_by_all_of_their_weights():
    entries = pj.prune.magnitude(PARAMS)
    up, down = (np.abs(np.asarray(PARAMS["blocks"][name]["kernel"])) for name in ("up", "down"))
    scores = pj.prune.pooled(entries, GROUPS)
    np.testing.assert_allclose(scores["inner"], up.sum(1) + down.sum(2), rtol=1e-5)
    np.testing.assert_allclose(scores["pairs"], up.sum(1).reshape(2, 2, 3).sum(1), rtol=1e-5)
    means = pj.prune.pooled(entries, GROUPS, reduce="mean", reads=False)
    np.testing.assert_allclose(means["inner"], up.mean(1), rtol=1e-5)
    lengths = pj.prune.pooled(entries, {"inner": GROUPS["inner"]}, normalize="l2")["inner"]
    want = sum(own / np.linalg.norm(own, axis=-1, keepdims=True) for own in (up.sum(1), down.sum(2)))
    np.testing.assert_allclose(lengths, want, rtol=1e-5)
    ranges = pj.prune.pooled(entries, {"pairs": GROUPS["pairs"]}, normalize="range")["pairs"]
    assert (ranges.min(), ranges.max()) == (0, 1)
    with pytest.raises(pj.PeftError, match="no weight of the group 'pairs' has scores"):
        pj.prune.pooled({"blocks/down/kernel": down}, {"pairs": GROUPS["pairs"]})


def test_masks_hit_their_target_exactly():
    scores = {name: jnp.asarray(RNG.integers(0, 3, group.shape)) for name, group in GROUPS.items()}  # ties
    for keep, number in ((0.5, 3), (0.58, 3), (1.0, 6), (0.01, 1), (2, 2)):
        kept = pj.prune.select({"inner": scores["inner"]}, keep)["inner"]
        assert kept.sum(-1).tolist() == [number, number]
        for row, own in zip(np.asarray(scores["inner"]), np.asarray(kept)):
            assert row[own].sum() == np.sort(row)[6 - number :].sum()
    traced = jax.jit(lambda keep: pj.prune.select({"inner": scores["inner"]}, keep)["inner"])
    np.testing.assert_array_equal(traced(0.5), pj.prune.select({"inner": scores["inner"]}, 0.5)["inner"])
    everywhere = pj.prune.select(scores, 7, scope="global")
    assert sum(int(own.sum()) for own in everywhere.values()) == 7
    apart = pj.prune.select(scores, {"inner": 2, "pairs": 1.0})
    assert (apart["inner"].sum(), apart["pairs"].sum()) == (4, 6)
    entries = pj.prune.magnitude(PARAMS)
    by_matrix = pj.prune.select_entries(entries, 0.3)
    assert [own.sum((1, 2)).tolist() for own in by_matrix.values()] == [[14, 14], [14, 14]]
    by_output = pj.prune.select_entries(entries, 0.5, scope="output")
    assert (by_output[UP].sum(1) == 4).all()
    assert sum(int(own.sum()) for own in pj.prune.select_entries(entries, 0.4, scope="global").values()) == 77
    pattern = pj.prune.select_n_of_m(entries, 2, 4, layouts={"down": "soi"})
    assert (pattern[UP].reshape(2, 2, 4, 6).sum(2) == 2).all()
    assert (pattern["blocks/down/kernel"].reshape(2, 6, 2, 4).sum(3) == 2).all()
    masked = pj.prune.with_entries(PARAMS, pattern)
    np.testing.assert_array_equal(masked["blocks"]["up"]["kernel"], np.where(pattern[UP], W, 0))
    whole = pj.prune.with_entries(PARAMS, pj.prune.select_entries(entries, 1.0))
    jax.tree.map(np.testing.assert_array_equal, whole, PARAMS)


def test_what_cannot_be_selected_says_so():
    scores = pj.prune.magnitude(PARAMS)
    for keep in (0.0, 1.5, -1, 7):
        with pytest.raises(pj.PeftError, match="select: keep must be"):
            pj.prune.select({"inner": jnp.ones((2, 6))}, keep)
    with pytest.raises(pj.PeftError, match="keep names no share of the group 'inner'"):
        pj.prune.select({"inner": jnp.ones((2, 6))}, {"outer": 1})
    with pytest.raises(pj.PeftError, match="m = 4 does not divide the 6 inputs of 'blocks/down/kernel'"):
        pj.prune.select_n_of_m(scores, 2, 4)
    with pytest.raises(pj.PeftError, match="n must be from 1 to m = 4"):
        pj.prune.select_n_of_m(scores, 5, 4)
    with pytest.raises(pj.PeftError, match=r"closest: 'blocks/up/kernel'"):
        pj.prune.with_entries(PARAMS, {"blocks/up": scores[UP]})


def reference(w, moment, mask, damping=0.01):
    """SparseGPT's update by its definition: after each input, the best change of those that are left."""
    w, n = np.array(w, np.float64), len(w)
    h = np.asarray(moment, np.float64) + damping * np.diag(moment).mean() * np.eye(n)
    for i in range(n):
        inverse = np.linalg.inv(h[i:, i:])
        gone = np.where(mask[i], 0, w[i])
        w[i:] -= inverse[:, :1] / inverse[0, 0] * gone
    return w * mask


def test_the_rest_is_updated_as_by_the_inverse_hessian():
    up = MOMENTS[UP]
    kept = pj.prune.select_entries(pj.prune.wanda(PARAMS, MOMENTS), 0.5, scope="output")
    result = pj.prune.sparsegpt(PARAMS, MOMENTS, kept=kept)
    for layer in range(2):
        want = reference(W[layer], up[layer], np.asarray(kept[UP][layer]))
        np.testing.assert_allclose(result.params["blocks"]["up"]["kernel"][layer], want, atol=2e-4)
    lost = lambda params: np.square(np.einsum("lti,lio->lto", X, params["blocks"]["up"]["kernel"] - W)).sum()
    assert lost(result.params) < 0.95 * lost(pj.prune.with_entries(PARAMS, kept))
    chosen = pj.prune.sparsegpt(PARAMS, MOMENTS, keep=0.3, block=3)
    assert chosen.kept[UP].sum((1, 2)).tolist() == [14, 14]
    np.testing.assert_array_equal(chosen.params["blocks"]["up"]["kernel"] != 0, chosen.kept[UP])
    pattern = pj.prune.sparsegpt(PARAMS, MOMENTS, n_of_m=(2, 4))
    assert (pattern.kept[UP].reshape(2, 2, 4, 6).sum(2) == 2).all()
    whole = pj.prune.sparsegpt(PARAMS, MOMENTS, keep=1.0)
    np.testing.assert_array_equal(whole.params["blocks"]["up"]["kernel"], W)
    dead = up[0].at[3].set(0).at[:, 3].set(0)  # an input that is always zero
    out, _ = _matrix(W[0], dead, keep=0.5, n_of_m=None, damping=0.01, block=128)
    assert np.isfinite(out).all()
    with pytest.raises(pj.PeftError, match="there is no such parameter"):
        pj.prune.sparsegpt(PARAMS, {"up": up})


@pytest.mark.slow
def test_on_eight_devices_it_is_the_same():
    model, params = make("llama")
    batches = [batch_of("llama")]
    mask = lambda batch: batch["attention_mask"].reshape(-1)

    def all_of(params):
        own = pj.calibrate.input_statistics(model, params, batches, targets=["up", "down"], mask=mask)
        groups = pj.prune.groups_of(model, params)
        groups = {"neurons": groups["neurons"]}
        scores = pj.prune.wanda(params, own.moments)
        units = pj.prune.pooled(scores, groups)
        kept = pj.prune.select(units, 0.5)
        small = pj.prune.sliced(model, params, groups, kept)
        return units, kept, small.params, pj.prune.sparsegpt(params, own.moments).kept

    mesh = make_mesh("fsdp=4,tensor=2")
    one, eight = all_of(params), all_of(shard(params, mesh))
    np.testing.assert_allclose(one[0]["neurons"], eight[0]["neurons"], rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, (one[1], one[2]), (eight[1], eight[2]))
    both = zip(*map(jax.tree.leaves, (one[3], eight[3])))
    same = [np.mean(np.asarray(a) == np.asarray(b)) for a, b in both]
    assert min(same) > 0.99  # rounding may exchange two equal entries


def test_the_share_for_a_target_is_the_largest():
    model, params = make("llama")
    groups = pj.prune.groups_of(model, params)
    groups = {name: groups[name] for name in ("heads", "neurons")}
    asked = []

    def cost(small, shapes):
        asked.append(small)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small.shapes)
        return pj.prune.parameters(small, shapes)

    limit = 0.8 * tree.count(params)
    share = pj.prune.largest_share(model, params, groups, limit, cost)
    assert len(asked) <= 5  # of 12 sizes
    # Of each layer: kernels and biases of up and gate, and down; those of query, key and value, and output.
    neuron, head = 3 * (3 * 16 + 2), 3 * (8 * 17 + 2 * 4 * 17 + 8 * 16)
    whole, sizes = tree.count(params), {}
    for keep in range(1, 13):
        heads = max(1, int(keep / 12 * 2 + 0.5))
        sizes[keep / 12] = whole - (12 - keep) * neuron - (2 - heads) * head
    assert share == max(keep for keep, size in sizes.items() if size <= limit)
    assert pj.prune.largest_share(model, model.shapes, groups, tree.count(params)) == 1.0
    with pytest.raises(pj.PeftError, match="the smallest model costs"):
        pj.prune.largest_share(model, params, groups, 10)


@pytest.mark.slow
def test_planted_useless_heads_and_neurons_are_found():
    model, params = make("gpt2")
    groups = pj.prune.groups_of(model, params)
    groups = {name: groups[name] for name in ("heads", "neurons")}
    alive = {name: np.ones(group.shape, bool) for name, group in groups.items()}
    for layer, (head, neurons) in enumerate(((1, [0, 5]), (3, [2, 11]), (0, [7, 8]))):
        alive["heads"][layer, head] = False
        alive["neurons"][layer, neurons] = False
    # What they give is read a thousandth as strongly.
    dim = {name: jnp.where(own, 1.0, 1e-3) for name, own in alive.items()}
    leaves = tree.named_leaves(params)
    heads = jnp.repeat(dim["heads"], 4, axis=1)[..., None] * leaves["blocks/attention/output/kernel"]
    neurons = dim["neurons"][..., None] * leaves["blocks/feed_forward/down/kernel"]
    planted = {"blocks/attention/output/kernel": heads, "blocks/feed_forward/down/kernel": neurons}
    params = tree.replace(params, planted)
    batches = [batch_of("gpt2")]
    loss = lambda params, batch: jnp.mean(jnp.square(model(params, batch)) * jnp.arange(16))
    gradients = pj.calibrate.mean_gradient(loss, params, batches)
    method = pj.lora(rank=4, init="orthogonal")
    frozen, trainable = method.init(jax.random.key(0), params)
    adapted = pj.adapt(loss)
    grads = jax.jit(jax.grad(lambda t: adapted(method.apply(frozen, t), batches[0])))(trainable)
    readers = list(planted)
    stats = pj.calibrate.input_statistics(model, params, batches, targets=readers)
    for scores in (
        pj.prune.taylor(params, gradients),
        pj.prune.wanda(params, stats.moments),
        pj.prune.magnitude(params, targets=readers),
        pj.prune.taylor(method.apply(frozen, trainable), pj.prune.lora_gradients(params, trainable, grads)),
    ):
        units = pj.prune.pooled(scores, groups, reads=True)
        kept = pj.prune.select(units, {"heads": 3, "neurons": 10})
        for name, own in alive.items():
            np.testing.assert_array_equal(kept[name], own)


def test_the_residual_of_an_exact_layer_needs_no_update():
    """Where inputs do not correlate there is nothing to make up for."""
    moment = {"w": jnp.diag(jnp.arange(1.0, 5.0))}
    params = {"w": normal(jax.random.key(0), (4, 3))}
    result = pj.prune.sparsegpt(params, moment, keep=0.5, damping=0.0, layouts={"w": "io"})
    kept = result.kept["w"]
    np.testing.assert_allclose(result.params["w"], np.where(kept, params["w"], 0), rtol=1e-6)
    scores = pj.prune.wanda(params, moment, layouts={"w": "io"})
    np.testing.assert_array_equal(kept, pj.prune.select_entries(scores, 0.5)["w"])


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["needed", "flops"])
def test_a_compiled_step_fits_its_bytes_and_flops(measure):
    model, params = make("llama")
    groups = pj.prune.groups_of(model, params)
    groups = {name: groups[name] for name in ("heads", "neurons")}
    batch, method = batch_of("llama"), pj.lora(rank=2)

    def cost(model, params):
        loss = lambda outputs, batch: jnp.mean(jnp.square(outputs))
        return getattr(pj.plan(method, model, params, batch, optimizer=optax.adamw(1e-3), loss=loss), measure)

    def at(share):
        ones = {name: jnp.ones(group.shape) for name, group in groups.items()}
        return cost(*pj.prune.sliced(model, params, groups, pj.prune.select(ones, share))[:2])

    limit = 0.85 * at(1.0)
    share = pj.prune.largest_share(model, params, groups, limit, cost)
    assert at(share) <= limit < at(share + 1 / 12)
