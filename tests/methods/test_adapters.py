"""Several adapters on one base: switched, added, combined and mixed per row of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, example_of, quick_at
from tiny_models import EVERY_WEIGHT, moved, tiny

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError

MODEL = tiny("words")
BATCH = jnp.concatenate([MODEL.batch, MODEL.batch[::-1]])  # four rows
RUN = jax.jit(lambda params, batch: pj.adapt(MODEL.forward)(params, batch))


def adapter(seed, method=None, **options):
    if method is None:
        method = pj.lora(**{"rank": 2, "alpha": 4.0, "targets": EVERY_WEIGHT, **options})
    frozen, trainable = method.init(jax.random.key(seed), MODEL.params)
    return method, frozen, moved(trainable, seed)


@functools.cache
def three():
    return adapter(1), adapter(2, rank=3, targets=["up"]), adapter(3, targets=["down", "embedding"])


def out_of(params, batch=BATCH):
    return RUN(params, batch)


def alone(one):
    method, frozen, trainable = one
    return out_of(method.apply(frozen, trainable))


def merged(params):
    return tree.map_named(lambda _, leaf: pj.dense(leaf), params)


def delta(one):
    method, frozen, trainable = one
    return jax.tree.map(lambda a, b: a - b, method.merge(frozen, trainable), MODEL.params)


def base_plus(*deltas):
    return jax.tree.map(lambda w, *d: w + sum(d), MODEL.params, *deltas)


def test_switching_back_and_off_is_exact():
    first, second, _ = three()
    before = [np.array(leaf) for leaf in jax.tree.leaves(MODEL.params)]
    wanted, base = alone(first), out_of(MODEL.params)
    assert not np.array_equal(alone(second), wanted)
    pj.adapters.add([first, second])
    np.testing.assert_array_equal(alone(first), wanted)
    np.testing.assert_array_equal(out_of(MODEL.params), base)
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(MODEL.params)))


def test_another_adapter_of_the_same_shape_compiles_nothing():
    method, frozen, trainable = adapter(1)
    run = jax.jit(lambda t, f, x: pj.adapt(MODEL.forward)(method.apply(f, t), x))
    run(trainable, frozen, BATCH)
    run(moved(trainable, 5), frozen, BATCH)
    assert run._cache_size() == 1


@pytest.mark.slow
def test_adapters_of_other_ranks_scales_and_weights_are_exchanged_without_compiling():
    method, trainables = pj.adapters.alike(three(), rank=4)
    frozen, _ = method.init(KEY, MODEL.params)
    run = jax.jit(lambda trainable, batch: pj.adapt(MODEL.forward)(method.apply(frozen, trainable), batch))
    for one, trainable in zip(three(), trainables):
        assert_close(run(trainable, BATCH), alone(one), 1e-5)
    assert run._cache_size() == 1
    with pytest.raises(PeftError, match="rank 3; give a rank of at least that"):
        pj.adapters.alike(three(), rank=2)


def test_active_adapters_add_up_in_any_order():
    one, two, three_ = three()
    wanted = MODEL.forward(base_plus(delta(one), delta(two), delta(three_)), BATCH)
    assert_close(out_of(pj.adapters.add([one, two, three_])), wanted)
    assert_close(out_of(pj.adapters.add([three_, one, two])), wanted)


def test_adapters_on_different_weights_add_up():
    _, two, three_ = three()
    assert_close(merged(pj.adapters.add([two, three_])), base_plus(delta(two), delta(three_)))


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.5, 0.0])
def test_weights_scale_the_delta_exactly_once(weight):
    one = three()[0]
    wanted = base_plus(jax.tree.map(lambda d: weight * d, delta(one)))
    assert_close(merged(pj.adapters.add([one], [weight])), wanted)
    method, trainable = pj.adapters.combine([one], [weight])
    assert_close(method.merge(method.init(KEY, MODEL.params)[0], trainable), wanted)


def test_an_adapter_minus_itself_is_nothing():
    one = three()[0]
    assert_close(merged(pj.adapters.add([one, one], [1.0, -1.0])), MODEL.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, info in pj.METHODS.items() if not info.of_blocks])
def test_every_method_adds_up_or_says_why_not(name):
    first = adapter(1, example_of(name))
    second = (*first[:2], moved(first[2], 9))
    try:
        params = pj.adapters.add([first, second])
    except PeftError as error:
        if "not its base plus one low-rank" not in str(error) and "is trained as it is" not in str(error):
            raise
        return
    base = merged(first[1].params)  # arrays also where a method keeps codes
    deltas = [jax.tree.map(lambda w, b: w - b, m.merge(f, t), base) for m, f, t in (first, second)]
    assert_close(merged(params), jax.tree.map(lambda w, a, b: w + a + b, base, *deltas))


# Combined into one.


def both(rank=None, **options):
    pair = [adapter(4, **options), adapter(5, **{**options, "rank": 3})]
    weights = [0.7, -1.3]
    wanted = base_plus(*[jax.tree.map(lambda d, w=w: w * d, delta(a)) for a, w in zip(pair, weights)])
    method, trainable = pj.adapters.combine(pair, weights, rank=rank)
    frozen, _ = method.init(KEY, MODEL.params)
    return method, trainable, method.merge(frozen, trainable), wanted


@pytest.mark.parametrize("rslora", [False, True])
def test_a_combination_is_exact_and_its_ranks_add_up(rslora):
    method, trainable, got, wanted = both(rslora=rslora)
    assert_close(got, wanted)
    assert all(slots["a"].shape[-2] == 5 for slots in trainable.values())
    assert not method.config["rslora"]


@pytest.mark.slow
def test_a_combination_is_exact_where_the_ranks_add_up_to_more_than_the_matrix_has():
    pair = [adapter(4, rank=6), adapter(5, rank=7)]
    method, trainable = pj.adapters.combine(pair)
    frozen, fresh = method.init(KEY, MODEL.params)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, trainable)
    assert_close(method.merge(frozen, trainable), base_plus(*map(delta, pair)))


@pytest.mark.slow
def test_a_lower_rank_is_the_best_there_is():
    _, trainable, got, wanted = both(rank=3)
    for path, slots in trainable.items():
        assert slots["a"].shape[-2] == 3
        w, base = (tree.named_leaves(params)[path] for params in (wanted, MODEL.params))
        sizes = np.linalg.svd(w - base, compute_uv=False)
        missed = np.linalg.norm(tree.named_leaves(got)[path] - w)
        np.testing.assert_allclose(missed, np.sqrt(np.sum(sizes[3:] ** 2)), rtol=1e-3)
        assert missed > 0.01


def test_a_combination_can_be_trained_on_and_saved():
    method, trainable, *_ = both()
    again = pj.build(pj.describe(method))
    frozen, fresh = again.init(KEY, MODEL.params)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, trainable)
    assert jax.tree.structure(again.apply(frozen, trainable)) == jax.tree.structure(
        again.apply(frozen, fresh)
    )


def test_a_combination_hits_no_weight_whose_name_only_ends_alike():
    params = {"up": {"kernel": jnp.eye(4)}, "other": {"up": {"kernel": jnp.eye(4)}}}
    method = pj.lora(rank=1, targets="up/kernel")
    frozen, trainable = method.init(KEY, params)
    combined, of_both = pj.adapters.combine([(method, frozen, trainable)])
    assert list(of_both) == list(combined.init(KEY, params)[1]) == ["up/kernel"]


@pytest.mark.slow
def test_a_combination_of_stacked_layers_some_left_out():
    model = tiny("transformer")
    method = pj.lora(rank=2, targets=["up", "query"], layers=1)
    other = pj.lora(rank=1, targets=["up"])
    pair = []
    for seed, m in enumerate((method, other)):
        frozen, trainable = m.init(KEY, model.params)
        pair.append((m, frozen, moved(trainable, seed)))
    combined, trainable = pj.adapters.combine(pair)
    frozen, _ = combined.init(KEY, model.params)
    deltas = [jax.tree.map(lambda a, b: a - b, m.merge(f, t), model.params) for m, f, t in pair]
    wanted = jax.tree.map(lambda w, a, b: w + a + b, model.params, *deltas)
    assert_close(combined.merge(frozen, trainable), wanted)


# Mixed per row.


def test_each_row_sees_its_own_adapter_or_the_base():
    adapters = three()
    single = [*map(alone, adapters), out_of(MODEL.params)]
    run = jax.jit(lambda rows: pj.adapt(MODEL.forward)(pj.adapters.mix(adapters, rows), BATCH))
    for rows in ([0, 1, 2, -1], [2, 2, 0, 1], [-1, -1, -1, -1]):
        wanted = jnp.stack([single[row][n] for n, row in enumerate(rows)])
        assert_close(run(jnp.array(rows)), wanted)
    assert run._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", quick_at(["transformer", "nnx"], 0))
def test_rows_are_mixed_through_stacked_layers(name):
    model = tiny(name)
    method = pj.lora(rank=2, targets=EVERY_WEIGHT)
    frozen, trainable = method.init(KEY, model.params)
    pair = [(method, frozen, moved(trainable, seed)) for seed in (1, 2)]
    run = jax.jit(lambda rows: pj.adapt(model.forward)(pj.adapters.mix(pair, rows), model.batch))
    plain = jax.jit(model.forward)
    second = plain(method.merge(frozen, pair[1][2]), model.batch)
    base = plain(model.params, model.batch)
    assert_close(run(jnp.array([1, -1])), jnp.stack([second[0], base[1]]))


def test_a_row_beyond_the_last_takes_the_last():
    adapters = three()[:2]
    mixed = out_of(pj.adapters.mix(adapters, jnp.array([9, 1, 1, 0])))
    assert_close(mixed[0], alone(adapters[1])[0])


# Refused.


def test_the_same_plain_parameter_in_two_adapters_is_refused():
    one, two = (adapter(seed, pj.lora(rank=2, targets=["up"], bias="adapted")) for seed in (1, 2))
    for together in (
        pj.adapters.add,
        pj.adapters.combine,
        functools.partial(pj.adapters.mix, rows=jnp.zeros(4, int)),
    ):
        with pytest.raises(PeftError, match=r"lora: 'up/bias' is trained as it is; .* only factors"):
            together([one, two])


def test_dora_is_refused():
    one = adapter(1, pj.dora(rank=2, targets=["up"]))
    for together in (
        pj.adapters.add,
        pj.adapters.combine,
        functools.partial(pj.adapters.mix, rows=jnp.zeros(4, int)),
    ):
        with pytest.raises(PeftError, match=r"dora: 'up/kernel' is a ColumnNormalized, not its base plus"):
            together([one])


def test_two_low_rank_products_on_one_weight_are_refused():
    twice = pj.chain(pj.lora(rank=2, targets=["up"]), pj.lora(rank=2, targets=["up"]))
    with pytest.raises(PeftError, match=r"chain: 'up/kernel' is a LowRank, not its base plus one low-rank"):
        pj.adapters.add([adapter(1, twice), adapter(2, twice)])


def test_different_bases_are_refused():
    pissa = pj.pissa(rank=2, targets=["up"])
    with pytest.raises(PeftError, match=r"pissa: parameter 'up/kernel' is not the same array in both bases"):
        pj.adapters.add([adapter(1), adapter(2, pissa)])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pj.adapters.add([]), "give at least one adapter"),
        (lambda: pj.adapters.mix([], jnp.zeros(4, int)), "give at least one adapter"),
        (lambda: pj.adapters.combine([adapter(1)], rank=0), "combine: rank must be positive, got 0"),
        (lambda: pj.adapters.add([adapter(1)], [1.0, 2.0]), "1 adapters were given with 2 weights"),
    ],
)
def test_what_cannot_be_put_together(call, text):
    with pytest.raises(PeftError, match=text):
        call()


def test_a_mixture_has_no_dense_weight_and_needs_the_batch_in_front():
    params = pj.adapters.mix([adapter(1)], jnp.zeros(4, int))
    with pytest.raises(PeftError, match=r"up/kernel: adapters mixed per row have no single dense weight"):
        pj.dense(params["up"]["kernel"])
    with pytest.raises(PeftError, match=r"a batch of 4 rows, but this layer\s+sees an activation \(3,"):
        pj.matmul(jnp.zeros((3, 8)), params["up"]["kernel"])
