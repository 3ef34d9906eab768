"""Methods whose factors come from shared pools, or stop being trained: their equations, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.lowrank._noise import noise

PARAMS = {
    "up": {"kernel": normal(jax.random.key(1), (3, 8, 12))},
    "down": {"kernel": normal(jax.random.key(2), (12, 8))},
}


def changes(method, frozen, trainable):
    applied, base = method.merge(frozen, trainable), frozen.params
    return jax.tree.map(lambda new, old: np.asarray(new - old), applied, base)


# MoS.


def test_mos_takes_distinct_shards_and_its_own_private_ones():
    method = pj.mos(rank=3, stored=2, shards=2, private=1, alpha=6.0, targets=["up"])
    frozen, trainable = method.init(KEY, PARAMS)
    pools, places = trainable["shared"], frozen.state["up/kernel"]
    assert {name: pool.shape for name, pool in pools.items()} == {"a0": (12, 4), "b0": (12, 6)}
    for side in ("places_a", "places_b"):
        rows = np.asarray(places[side])
        assert rows.shape == (3, 6)
        for layer, own in enumerate(rows):
            assert len(set(own.tolist())) == 6
            assert own[4:].tolist() == [6 + 2 * layer, 7 + 2 * layer]
            assert (own[:4] < 6).all()
    assert not np.array_equal(places["places_a"], places["places_b"])
    trainable = noisy(trainable)
    found = changes(method, frozen, trainable)["up"]["kernel"]
    for layer in range(3):
        a = np.asarray(trainable["shared"]["a0"])[np.asarray(places["places_a"])[layer]].reshape(3, 8)
        b = np.asarray(trainable["shared"]["b0"])[np.asarray(places["places_b"])[layer]].reshape(3, 12)
        np.testing.assert_allclose(found[layer], 2.0 * a.T @ b, atol=1e-5)


def test_mos_with_all_rows_private_is_lora():
    method = pj.mos(rank=2, stored=2, shards=1, private=2, alpha=6.0, targets=["up"])
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable)
    a, b = (trainable["shared"][name].reshape(3, 2, -1) for name in ("a0", "b0"))
    found = changes(method, frozen, trainable)["up"]["kernel"]
    np.testing.assert_allclose(found, 3.0 * jnp.einsum("lri,lro->lio", a, b), atol=1e-5)


def test_layers_apart_share_pools_and_layers_that_are_not_chosen_stay():
    apart = {str(n): {"kernel": PARAMS["up"]["kernel"][n]} for n in range(3)}
    method = pj.mos(rank=2, stored=1, shards=2, private=0, targets=".*")
    frozen, trainable = method.init(KEY, apart)
    assert trainable["shared"]["a0"].shape == (6, 4)
    assert len(trainable["shared"]) == 2
    method = pj.mos(rank=2, stored=2, shards=2, private=1, targets=["up"], layers=[0, 2])
    frozen, trainable = method.init(KEY, PARAMS)
    found = changes(method, frozen, noisy(trainable))["up"]["kernel"]
    assert not found[1].any()
    assert found[0].any()
    assert found[2].any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shards": 5}, "5 shards do not divide both sides of 'up/kernel', a matrix of 8 x 12"),
        ({"rank": 8, "stored": 1}, "its 3 matrices share 0 others; lower the rank, or raise stored"),
        ({"private": 3}, "private 3 is more than stored 2 or the rank"),
    ],
)
def test_sizes_of_mos_that_do_not_fit_are_refused(options, text):
    with pytest.raises(PeftError, match=text):
        pj.mos(**{"rank": 3, "shards": 2, "targets": ["up"], **options}).init(KEY, PARAMS)


# VB-LoRA.


def test_vblora_is_the_sum_of_its_chosen_vectors():
    method = pj.vblora(rank=2, vectors=6, length=4, chosen=2, targets=["up"], layers=[0, 2])
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable)
    bank, own = np.asarray(trainable["shared"]["bank"]), trainable["up/kernel"]

    def rows(logits):
        found = np.zeros((*logits.shape[:-1], 4), np.float32)
        for place in np.ndindex(*logits.shape[:-1]):
            best = np.argsort(-logits[place])[:2]
            weights = np.exp(logits[place][best])
            found[place] = (weights / weights.sum()) @ bank[best]
        return found.reshape(*logits.shape[:-2], -1)

    a, b = (rows(np.asarray(own[name])) for name in ("logits_a", "logits_b"))
    found = changes(method, frozen, trainable)["up"]["kernel"]
    np.testing.assert_allclose(found[[0, 2]], np.einsum("lri,lro->lio", a, b), atol=1e-5)
    assert not found[1].any()


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(
        PeftError, match="length 8 does not divide both sides of 'up/kernel', a matrix of 8 x"
    ):
        pj.vblora(length=8, targets=["up"]).init(KEY, PARAMS)


# TinyLoRA and Uni-LoRA.


def test_tinylora_shares_its_numbers_by_groups_in_the_order_of_the_layers():
    params = {**PARAMS, "gate": {"kernel": normal(jax.random.key(3), (3, 8, 12))}}
    method = pj.tinylora(rank=2, size=3, tying=0.5, targets=["up", "gate"])
    frozen, trainable = method.init(KEY, params)
    groups = {path: slots["group"].tolist() for path, slots in frozen.state.items() if path != "shared"}
    assert groups == {"gate/kernel": [0, 1, 2], "up/kernel": [0, 1, 2]}
    trainable = noisy(trainable)
    found = changes(method, frozen, trainable)["up"]["kernel"]
    own = {name: np.asarray(array) for name, array in frozen.state["up/kernel"].items()}
    for layer in range(3):
        turn = np.einsum("u,uij->ij", np.asarray(trainable["shared"]["v"])[layer], own["p"][layer])
        np.testing.assert_allclose(found[layer], own["a"][layer].T @ turn.T @ own["b"][layer], atol=1e-5)
        u, sizes, vt = np.linalg.svd(np.asarray(params["up"]["kernel"][layer]))
        principal = (u[:, :2] * sizes[:2]) @ vt[:2]
        np.testing.assert_allclose(own["a"][layer].T @ own["b"][layer], principal, atol=1e-4)
    for tying, count in ((0.0, 6), (1.0, 1), (0.3, 4)):
        _, trainable = pj.tinylora(size=3, tying=tying, targets=["up", "gate"]).init(KEY, params)
        assert trainable["shared"]["v"].shape == (count, 3)


def test_unilora_chooses_every_number_equally_often():
    method = pj.unilora(rank=2, size=7, targets=["up", "down"])
    frozen, trainable = method.init(KEY, PARAMS)
    state = dict(frozen.state)
    scale = np.asarray(state.pop("shared")["scale"])
    chosen = np.concatenate([np.ravel(index) for own in state.values() for index in own.values()])
    counts = np.bincount(chosen)
    assert len(chosen) == 2 * (3 * 20 + 20)
    assert counts.max() - counts.min() <= 1
    np.testing.assert_allclose(scale, 1.0 / np.sqrt(counts), rtol=1e-6)
    theta = np.asarray(trainable["shared"]["theta"]) * scale
    a, b = (theta[np.asarray(state["up/kernel"][name])] for name in ("index_a", "index_b"))
    found = changes(method, frozen, trainable)["up"]["kernel"]
    np.testing.assert_allclose(found, np.einsum("lri,lro->lio", a, b), atol=1e-6)


# RandLoRA.


@pytest.mark.parametrize("name", ["up", "down"])
def test_randlora_is_the_sum_of_its_scaled_bases_stored_or_drawn(name):
    found = {}
    for bases in ("stored", "drawn"):
        method = pj.randlora(rank=3, alpha=6.0, bases=bases, targets=[name])
        frozen, trainable = method.init(KEY, PARAMS)
        trainable = noisy(trainable)
        found[bases] = changes(method, frozen, trainable)[name]["kernel"]
        if bases == "stored":
            shared = {key: np.asarray(array) for key, array in frozen.state["shared"].items()}
    np.testing.assert_allclose(found["stored"], found["drawn"], atol=1e-5)
    own = {key: np.asarray(array) for key, array in trainable[f"{name}/kernel"].items()}
    assert own["scales"].shape[-2:] == (3, 3)
    assert own["gains"].shape[-2:] == (3, 8)
    of_layer = {key: array[1] if name == "up" else array for key, array in own.items()}
    wanted = np.zeros((12, 8))
    long = shared["b"].reshape(12, -1)
    for i, j in np.ndindex(3, 3):
        row = of_layer["scales"][i, j] * shared["a"][i] * of_layer["gains"][j]
        wanted += 2.0 * np.outer(long[:, 3 * i + j], row)
    got = found["drawn"][1].T if name == "up" else found["drawn"]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.linalg.matrix_rank(got, tol=1e-4) == 8


def test_noise_follows_from_the_place_alone_and_looks_random():
    whole = np.asarray(noise(jnp.uint32(7), (300, 200)))
    np.testing.assert_array_equal(noise(jnp.uint32(7), (20, 30)), whole[:20, :30])
    assert not np.array_equal(noise(jnp.uint32(8), (20, 30)), whole[:20, :30])
    assert abs(whole.mean()) < 5 / np.sqrt(whole.size)
    assert abs(whole.std() - 1.0) < 5 / np.sqrt(whole.size)
    assert np.abs(whole).max() <= np.sqrt(3.0)
    # As of independent rows, every singular value lies near the bounds of Marchenko and Pastur.
    sizes = np.linalg.svd(whole, compute_uv=False) / np.sqrt(300)
    assert sizes.max() < 1.0 + np.sqrt(2 / 3) + 0.05
    assert sizes.min() > 1.0 - np.sqrt(2 / 3) - 0.05
    np.testing.assert_allclose(whole[0, :3], [1.6768228, 0.5741143, -1.1043936], rtol=1e-6)


# OSF.


def test_osf_moves_nothing_in_the_frozen_space():
    method = pj.osf(preserved=3, targets=["up", "down"])
    frozen, trainable = method.init(KEY, PARAMS)
    merged = method.merge(frozen, trainable)
    jax.tree.map(lambda new, old: np.testing.assert_allclose(new, old, atol=1e-5), merged, PARAMS)
    held = sum(leaf.size for leaf in jax.tree.leaves((frozen.params, frozen.state)))
    assert held == 4 * 3 * (8 + 12)  # the frozen directions, and no weight

    def loss(trainable):
        return sum(jnp.sum(jnp.sin(w)) for w in jax.tree.leaves(method.merge(frozen, trainable)))

    trainable = noisy(trainable)
    grads = jax.jit(jax.grad(loss))(trainable)
    for path, own in grads.items():
        high = frozen.params[path.split("/")[0]]["kernel"]
        for name, directions in (("u", high.a), ("v", high.b)):
            assert np.abs(own[name]).max() > 1e-2
            np.testing.assert_allclose(own[name] @ jnp.swapaxes(directions, -1, -2), 0.0, atol=1e-4)


def test_osf_needs_directions_that_are_trained():
    with pytest.raises(PeftError, match="has 8 directions, and of 8 that stay none or all are left"):
        pj.osf(preserved=8, targets=["up"]).init(KEY, PARAMS)


# PVeRA.


def test_pvera_draws_around_the_mean_and_each_key_draws_its_own():
    method = pj.pvera(rank=3, targets=["down"])
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable, scale=0.5)
    x = normal(jax.random.key(5), (2, 12))
    run = jax.jit(
        lambda key: pj.adapt(lambda p, x: x @ p["down"]["kernel"])(
            method.apply(frozen, trainable, key=key), x
        )
    )
    drawn = np.stack([run(jax.random.key(n)) for n in range(2000)]) - np.asarray(x @ PARAMS["down"]["kernel"])
    d, c = (np.asarray(trainable["down/kernel"][name]) for name in ("d", "c"))
    a, b = (np.asarray(frozen.state["shared"][name]) for name in ("a", "b"))
    inner = np.asarray(x) @ a.T * d
    mean, deviation = inner[:, :3], np.exp(0.5 * inner[:, 3:])
    out = b * c
    spread = np.sqrt(deviation**2 @ out**2)
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.1)
    assert (np.abs(drawn.mean(0) - mean @ out) < 5 * spread / np.sqrt(2000)).all()
    np.testing.assert_allclose(
        changes(method, frozen, trainable)["down"]["kernel"], a[:3].T @ (d[:3, None] * out), atol=1e-5
    )
    assert not np.array_equal(drawn[0], drawn[1])


# LaMDA.


def test_lamda_stops_the_first_directions_first_and_nothing_moves_them_again():
    method = pj.lamda(rank=3, alpha=6.0, unfrozen=0.5, total_steps=12, targets=["up", "down"])
    frozen, trainable = method.init(KEY, PARAMS)
    tx = method.optimizer(optax.adamw(0.1, weight_decay=0.5))
    state, update = tx.init(trainable), jax.jit(tx.update)
    history = [trainable]
    for _ in range(9):
        updates, state = update(jax.tree.map(jnp.ones_like, trainable), state, trainable, frozen=frozen)
        trainable = optax.apply_updates(trainable, updates)
        history.append(trainable)
    for path in ("up/kernel", "down/kernel"):
        b = np.stack([np.asarray(now[path]["b"]) for now in history])
        moves = np.array(
            [
                [(n != o).any() for n, o in zip(new, old)]
                for new, old in zip(np.moveaxis(b[1:], -2, 1), np.moveaxis(b[:-1], -2, 1))
            ]
        )
        assert moves.sum(0).tolist() == [2, 4, 6]
        assert all(now.tolist() == sorted(now.tolist()) for now in moves)
        core = np.stack([np.asarray(now[path]["core"]) for now in history])
        assert (core[1:] != core[:-1]).any(tuple(range(1, core.ndim))).all()


def test_lamda_works_between_the_first_singular_directions():
    method = pj.lamda(rank=2, alpha=6.0, unfrozen=0.0, targets=["down"])
    frozen, trainable = method.init(KEY, PARAMS)
    assert trainable["down/kernel"].keys() == {"core"}
    trainable = noisy(trainable)
    u, _, vt = np.linalg.svd(np.asarray(PARAMS["down"]["kernel"]))
    found = changes(method, frozen, trainable)["down"]["kernel"]
    between = u[:, :2].T @ found @ vt[:2].T
    np.testing.assert_allclose(np.linalg.norm(between), np.linalg.norm(found), rtol=1e-4)
    np.testing.assert_allclose(np.abs(between), 3.0 * np.abs(trainable["down/kernel"]["core"]), atol=1e-4)


def test_lamda_gives_the_slowest_spectra_the_most_directions():
    method = pj.lamda(ranks=[1, 4, 2], alpha=8.0, unfrozen=0.5, total_steps=16, targets=["up", "down"])
    frozen, trainable = jax.jit(method.init)(KEY, PARAMS)
    matrices = [("down", ()), *(("up", (layer,)) for layer in range(3))]
    squares = {
        (name, at): np.linalg.svd(np.asarray(PARAMS[name]["kernel"])[at], compute_uv=False) ** 2
        for name, at in matrices
    }
    order = sorted(matrices, key=lambda one: squares[one][:4].sum() / squares[one].sum())
    wanted = dict(zip(order, [4, 4, 2, 1]))
    found = pj.adapters.ranks(frozen)
    assert {one: int(found[f"{one[0]}/kernel"][one[1]]) for one in matrices} == wanted

    trainable = noisy(trainable)
    merged = changes(method, frozen, trainable)
    for (name, at), rank in wanted.items():
        own = {slot: np.asarray(array)[at] for slot, array in trainable[f"{name}/kernel"].items()}
        a = np.asarray(frozen.state[f"{name}/kernel"]["a"])[at][:rank]
        product = a.T @ own["core"][:rank, :rank] @ own["b"][:rank]
        np.testing.assert_allclose(merged[name]["kernel"][at], 8.0 / rank * product, atol=1e-5)

    tx = method.optimizer(optax.sgd(1.0))
    state, update, moved = tx.init(trainable), jax.jit(tx.update), {one: np.zeros(4) for one in matrices}
    for _ in range(9):
        updates, state = update(jax.tree.map(jnp.ones_like, trainable), state, trainable, frozen=frozen)
        for name, at in matrices:
            moved[name, at] += np.asarray(updates[f"{name}/kernel"]["b"])[at].any(axis=-1)
    for one, rank in wanted.items():
        assert moved[one][:rank].tolist() == [8 * (row + 1) / rank for row in range(rank)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": []}, "ranks is empty"),
        ({"ranks": [2, 0]}, "ranks must be positive, got 0"),
        ({"ranks": [2], "rank_pattern": {"up": 1}}, "leave rank_pattern out"),
    ],
)
def test_lamda_says_which_ranks_cannot_be(options, said):
    with pytest.raises(PeftError, match=said):
        pj.lamda(unfrozen=0.0, **options)


def test_lamda_needs_the_number_of_steps():
    with pytest.raises(PeftError, match="give total_steps, of which b is trained"):
        pj.lamda()
