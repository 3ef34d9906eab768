"""ROAST: the hash, how often each number is used, and gradients against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.methods.lowrank.roast import RoastOptions, _hashed, factors, mixed

PARAMS = {"up": {"kernel": normal(KEY, (6, 8))}, "down": {"kernel": normal(KEY, (8, 5))}}
X = normal(jax.random.key(1), (7, 6))
COUNT = 2 * (6 + 8) + 2 * (8 + 5)


def loss(params):
    return jnp.sum(jnp.sin(jnp.tanh(X @ params["up"]["kernel"]) @ params["down"]["kernel"]))


def places(mapping, size, count=1000, offset=0, tile=7):
    found = _hashed(offset, count, size, RoastOptions(mapping=mapping, tile=tile))[0]
    return np.asarray(found, np.int64)


def test_the_hash_is_that_of_whole_numbers_of_32_bits():
    def by_hand(x, seed):
        x = (x + seed) % 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    numbers = [0, 1, 2, 77, 2**31, 2**32 - 1]
    got = mixed(jnp.array(numbers, jnp.uint32), 12345)
    assert np.asarray(got).tolist() == [by_hand(n, 12345) for n in numbers]


def test_cyclic_places_are_used_equally_often_and_once_each_by_a_vector_that_is_long_enough():
    for size in (10, 333, 999):
        uses = np.bincount(places("cyclic", size), minlength=size)
        assert uses.sum() == 1000
        assert uses.max() - uses.min() <= 1
    assert len(set(places("cyclic", 1000).tolist())) == 1000
    # A chunk is a shift of the vector, and begins at another place than the one before.
    steps = np.diff(places("cyclic", 100)) % 100
    assert (steps == 1).sum() >= 989
    # The same, wherever an array begins.
    np.testing.assert_array_equal(places("cyclic", 100)[333:400], places("cyclic", 100, 67, 333))


@pytest.mark.parametrize("mapping", ["hashed", "tiles"])
def test_the_other_places_are_spread(mapping):
    found = places(mapping, 100)
    assert found.min() >= 0
    assert found.max() < 100
    assert len(set(found.tolist())) > 90
    runs = np.diff(found[:994].reshape(-1, 7)) == 1
    assert runs.all() == (mapping == "tiles")


def test_signs_are_even():
    signs = np.asarray(_hashed(0, 2000, 10, RoastOptions())[1])
    assert set(np.abs(signs).tolist()) == {1.0}
    assert abs(signs.mean()) < 0.1


def started(**options):
    method = pj.roast(**{"rank": 2, "alpha": 6.0, "density": 0.3, **options})
    return (method, *method.init(KEY, PARAMS))


def test_one_vector_is_trained_and_its_gradient_is_the_sum_over_its_entries():
    method, frozen, fresh = started()
    assert {path: list(slots) for path, slots in fresh.items()} == {"shared": ["vector"]}
    assert fresh["shared"]["vector"].shape == (round(0.3 * COUNT),)
    trainable = noisy(fresh, scale=0.02)
    got = jax.jit(jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t))))(trainable)["shared"]["vector"]
    grads = jax.jit(lambda t: jax.grad(loss)(method.merge(frozen, t)))(trainable)
    wanted, options = np.zeros(len(got)), RoastOptions(rank=2, alpha=6.0, density=0.3)
    for target in frozen.plan:
        n, m = target.layout.matrix
        a, b = factors(trainable["shared"]["vector"], target, options)
        g = np.asarray(grads[target.path.split("/")[0]]["kernel"])
        of_factors = 3.0 * np.concatenate([np.ravel(np.asarray(b) @ g.T), np.ravel(np.asarray(a) @ g)])
        sizes = np.repeat([1 / (np.sqrt(n) * 0.04), 1 / (np.sqrt(2) * 0.04)], [2 * n, 2 * m])
        at, signs = _hashed(target.offset, 2 * (n + m), len(got), options)
        np.add.at(wanted, np.asarray(at), of_factors * sizes * np.asarray(signs))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_factors_have_the_distribution_of_loras():
    params = {"up": {"kernel": jnp.zeros((400, 300))}}
    method = pj.roast(rank=16, density=0.5)
    frozen, fresh = method.init(KEY, params)
    a, b = factors(fresh["shared"]["vector"], frozen.plan[0], RoastOptions(rank=16))
    for factor, bound in ((a, 1 / 20), (b, 1 / 4)):
        np.testing.assert_allclose(np.std(factor), bound / np.sqrt(3), rtol=0.05)
        assert np.abs(factor).max() <= bound * 1.0001


def test_a_stable_step_of_sgd_moves_entries_by_the_mean_of_their_steps():
    # in = r, so that λ is the same for both factors.
    params = {"up": {"kernel": normal(KEY, (4, 6))}}
    method = pj.roast(rank=4, density=0.2)
    frozen, fresh = method.init(KEY, params)
    size = len(fresh["shared"]["vector"])
    at, signs = (np.asarray(v) for v in _hashed(0, 40, size, RoastOptions(rank=4)))
    uses = np.bincount(at, minlength=size)
    factor = 1 / (np.sqrt(4) * 0.04)
    np.testing.assert_allclose(frozen.state["shared"]["usage"], uses * factor**2, rtol=1e-3)
    of_entries = np.arange(40.0)
    gradient = np.zeros(size)
    np.add.at(gradient, at, factor * signs * of_entries)
    tx = method.optimizer(optax.sgd(1.0))
    own = {"shared": {"vector": jnp.asarray(gradient, jnp.float32)}}
    updates, _ = tx.update(own, tx.init(fresh), fresh, frozen=frozen)
    mean = np.zeros(size)
    np.add.at(mean, at, signs * of_entries)
    moves = factor * np.asarray(updates["shared"]["vector"])
    np.testing.assert_allclose(moves, -mean / uses, rtol=1e-2, atol=1e-4)
    plain = pj.roast(rank=4, density=0.2, stable=False).optimizer(optax.sgd(1.0))
    np.testing.assert_allclose(
        plain.update(own, plain.init(fresh), fresh, frozen=frozen)[0]["shared"]["vector"],
        -gradient,
        rtol=1e-5,
    )


def test_what_does_not_fit_says_so():
    with pytest.raises(pj.PeftError, match="roast: tiles of 256 are longer than the vector of 16 numbers"):
        started(mapping="tiles")
    with pytest.raises(pj.PeftError, match="roast: density must"):
        pj.roast(density=1.5)
    big = {"up": {"kernel": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}}
    with pytest.raises(pj.PeftError, match="entries of factors are too many"):
        pj.roast(rank=4096).init(KEY, big)
