"""Sparse adapters put into the weights, taken out, exchanged, summed and compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close
from tiny_models import EVERY_WEIGHT, moved, tiny

import peftjax as pj
from peftjax.core.errors import PeftError

MODEL = tiny("words")
METHODS = {
    "paca": pj.paca(rank=2, alpha=2.0),
    "shira": pj.shira(rank=2, targets=EVERY_WEIGHT),
    "sara": pj.sara(density=0.2),
    "in place": pj.shira(rank=1, in_place=True),
}


def adapter(name, seed=0):
    method = METHODS[name]
    frozen, trainable = method.init(jax.random.key(seed), MODEL.params)
    return method, frozen, moved(trainable, seed)


def copied():
    return jax.tree.map(jnp.copy, MODEL.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_fused_parameters_are_the_merged_ones_and_going_back_is_exact(name):
    method, frozen, trainable = adapter(name)
    fused, undo = pj.adapters.fuse(MODEL.params, pj.adapters.patches(method, frozen, trainable))
    assert_close(fused, method.merge(frozen, trainable), 0)
    assert_close(pj.adapters.fuse(fused, undo)[0], MODEL.params, 0)


def test_switching_writes_only_the_touched_places_of_the_given_arrays():
    first, second = adapter("shira"), adapter("paca", 1)
    params, undo = pj.adapters.switch(copied(), {}, pj.adapters.patches(*first))
    given = params
    params, undo = pj.adapters.switch(params, undo, pj.adapters.patches(*second))
    assert given["up"]["kernel"].is_deleted()
    assert_close(params, second[0].merge(*second[1:]), 0)
    params, undo = pj.adapters.switch(params, undo, {})
    assert undo == {}
    assert_close(params, MODEL.params, 0)


@pytest.mark.slow
def test_an_adapter_of_a_closed_base_and_one_with_a_weight():
    method, frozen, trainable = adapter("in place")
    patches = pj.adapters.patches(method, *method.close(frozen, trainable), weight=0.5)
    half = pj.adapters.fuse(MODEL.params, patches)[0]
    whole = method.merge(frozen, trainable)
    assert_close(half, jax.tree.map(lambda a, b: (a + b) / 2, whole, MODEL.params))


def test_disjoint_adapters_fuse_in_either_order_to_the_same_bits():
    halves = [pj.paca(rank=4, selection={"up": rows, "down": rows}) for rows in ([0, 2, 4, 6], [1, 3, 5, 7])]
    both = []
    for method in halves:
        frozen, trainable = method.init(KEY, MODEL.params)
        both.append(pj.adapters.patches(method, frozen, moved(trainable)))
    ends = [
        pj.adapters.fuse(pj.adapters.fuse(MODEL.params, first)[0], second)[0]
        for first, second in (both, both[::-1])
    ]
    assert_close(*ends, 0)


@pytest.mark.slow
def test_a_weighted_sum_of_several_kinds():
    adapters = [adapter("shira"), adapter("sara", 1), adapter("paca", 2)]
    lora = pj.lora(rank=2, targets=["up"])
    frozen, trainable = lora.init(KEY, MODEL.params)
    adapters.append((lora, frozen, moved(trainable)))
    weights = [0.5, -1.0, 2.0, 1.0]
    wanted = MODEL.params
    for (method, frozen, trainable), w in zip(adapters, weights):
        change = jax.tree.map(jnp.subtract, method.merge(frozen, trainable), MODEL.params)
        wanted = jax.tree.map(lambda total, d, w=w: total + w * d, wanted, change)
    added = pj.adapters.add(adapters, weights)
    found = jax.tree.map(pj.dense, added, is_leaf=lambda leaf: isinstance(leaf, pj.Weight))
    assert_close(found, wanted)
    assert_close(pj.adapt(MODEL.forward)(added, MODEL.batch), MODEL.forward(wanted, MODEL.batch))


def test_two_pacas_are_one_lora():
    adapters = [adapter("paca"), adapter("paca", 1)]
    method, trainable = pj.adapters.combine(adapters, [1.0, 0.5])
    frozen, _ = method.init(KEY, MODEL.params)
    found = method.merge(frozen, trainable)
    added = pj.adapters.add(adapters, [1.0, 0.5])
    assert_close(found, jax.tree.map(pj.dense, added, is_leaf=lambda leaf: isinstance(leaf, pj.Weight)))


def test_overlap_is_that_of_the_products():
    first, second = adapter("shira"), adapter("sara", 1)
    changes = [
        np.asarray(m.merge(f, t)["up"]["kernel"] - MODEL.params["up"]["kernel"])
        for m, f, t in (first, second)
    ]
    product = changes[0] @ changes[1].T
    largest, zeros = pj.adapters.overlap(first, second)["up/kernel"]
    np.testing.assert_allclose(largest, np.linalg.norm(product, 2), rtol=1e-5)
    np.testing.assert_allclose(zeros, np.mean(np.abs(product) == 0.0), atol=1e-6)
    assert 0 < zeros < 1


def test_errors():
    method = pj.lora(rank=2)
    frozen, trainable = method.init(KEY, MODEL.params)
    with pytest.raises(PeftError, match="'down/kernel' of lora is a LowRank; only trained rows"):
        pj.adapters.patches(method, frozen, trainable)
    patches = pj.adapters.patches(*adapter("shira"))
    with pytest.raises(PeftError, match="no parameter is called 'down/kernel'"):
        pj.adapters.fuse(
            {"norm": MODEL.params["norm"], "up": MODEL.params["up"]}, {"down/kernel": patches["down/kernel"]}
        )
    method, frozen, trainable = adapter("in place")
    with pytest.raises(PeftError, match=r"holds its trained values; give what method.open\(frozen, train"):
        pj.adapters.add([(method, *method.close(frozen, trainable))])
    with pytest.raises(PeftError, match="is a SparseEntries, not its base plus one low-rank"):
        pj.adapters.combine([adapter("shira")])
