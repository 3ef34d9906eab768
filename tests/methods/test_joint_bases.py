"""FRoD, AdaMSS and LILY: their equations, in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.lowrank._clusters import clustered, first_directions, normal_numbers
from peftjax.methods.structured.frod import joint_basis

PARAMS = {
    "up": {"kernel": normal(jax.random.key(1), (3, 8, 12)), "bias": normal(jax.random.key(2), (3, 12))},
    "down": {"kernel": normal(jax.random.key(3), (12, 8))},
}


# FRoD.


def test_frod_moves_the_values_of_a_weight_in_its_basis():
    method = pj.frod(density=0.2, targets=["up"], layers=[0, 2])
    frozen, trainable = method.init(KEY, PARAMS)
    shared = {name: np.asarray(array) for name, array in frozen.state["shared"].items()}
    rows, columns = shared["places0"]
    assert len({*zip(rows.tolist(), columns.tolist())}) == int(0.2 * 64)
    assert (rows != columns).all()
    trainable = noisy(trainable)
    new = np.asarray(method.merge(frozen, trainable)["up"]["kernel"])
    v, l0 = shared["v0"].astype(np.float64), np.asarray(frozen.state["up/kernel"]["l0"])
    for number, layer in enumerate((0, 2)):
        w = np.asarray(PARAMS["up"]["kernel"][layer], np.float64)
        u = np.linalg.solve(v, w) / l0[number][:, None]
        np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1.0, atol=1e-4)
        own = {name: np.asarray(array)[number] for name, array in trainable["up/kernel"].items()}
        between = np.diag(own["l"])
        between[columns, rows] = own["values"]
        np.testing.assert_allclose(new[layer], v @ between @ u, atol=1e-3)
    np.testing.assert_array_equal(new[1], PARAMS["up"]["kernel"][1])


@pytest.mark.parametrize("m", [12, 2])
def test_layers_of_one_spectrum_have_the_basis_of_their_common_directions(m):
    """Where the rows of all layers are fewer than the inputs, the basis is orthogonal."""
    matrices = [normal(jax.random.key(n), (8, m)) for n in range(3)]
    v = np.asarray(joint_basis(matrices, 1e-3), np.float64)
    rows = np.concatenate([np.asarray(w).T for w in matrices])
    if m == 2:
        np.testing.assert_allclose(v.T @ v, np.eye(8), atol=1e-5)
        return
    # V·Vᵀ is RᵀR, the products of all inputs.
    np.testing.assert_allclose(v @ v.T, rows.T @ rows, rtol=1e-3, atol=1e-3)


# AdaMSS.


def test_adamss_is_a_low_rank_update_for_each_cluster_of_outputs_and_of_the_bias():
    method = pj.adamss(rank=5, subspaces=3, subspace_rank=2, targets=["up"])
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable)
    merged = method.merge(frozen, trainable)["up"]
    own = {**frozen.state["up/kernel"], **trainable["up/kernel"]}
    for layer in range(3):
        a, b, v, of_bias, cluster = (
            np.asarray(own[name])[layer] for name in ("a", "b", "v", "of_bias", "cluster")
        )
        whole = np.concatenate([PARAMS["up"]["kernel"][layer], PARAMS["up"]["bias"][layer][None]])
        # The frozen directions are the first ones of the weight with its bias.
        found = np.concatenate([v, of_bias[:, None]], axis=1)
        sizes = np.linalg.svd(whole, compute_uv=False)
        assert np.linalg.norm(found @ whole) > 0.97 * np.linalg.norm(sizes[:5])
        np.testing.assert_allclose(found @ found.T, np.eye(5), atol=1e-5)
        for output, number in enumerate(cluster):
            change = b[output] @ a[number] @ found
            np.testing.assert_allclose(
                merged["kernel"][layer, :, output] - whole[:-1, output], change[:-1], atol=1e-5
            )
            np.testing.assert_allclose(
                merged["bias"][layer, output] - whole[-1, output], change[-1], atol=1e-5
            )


def test_a_cluster_of_few_rows_has_no_more_directions_than_rows():
    params = {"up": {"kernel": jnp.eye(6)[:, :5] + 0.01 * normal(KEY, (6, 5))}}
    frozen, trainable = pj.adamss(rank=5, subspaces=4, subspace_rank=3).init(KEY, params)
    sizes = np.bincount(np.asarray(frozen.state["up/kernel"]["cluster"]), minlength=4)
    ranks = np.asarray(trainable["up/kernel"]["a"]).any(-1).sum(-1)
    assert sizes.sum() == 5
    assert ranks.tolist() == np.minimum(sizes, 3).tolist()


def test_clusters_that_no_longer_matter_stop_for_good():
    options = {"init_warmup": 1, "final_warmup": 7, "allocate_every": 2, "target_subspaces": 2}
    method = pj.adamss(rank=4, subspaces=3, targets=["up"], **options)

    def loss(params, batch):
        out = jnp.einsum("lbi,lio->lbo", batch, params["up"]["kernel"])
        return jnp.mean(jnp.sin(out) ** 2)

    x = normal(jax.random.key(4), (3, 5, 8))
    training = pj.training(method, pj.adapt(loss), optax.adamw(0.1, weight_decay=0.5))
    state = training.start(KEY, jax.tree.map(jnp.copy, PARAMS))
    history, active = [state.trainable], []
    for _ in range(9):
        state, _ = training.step(state, x)
        history.append(jax.tree.map(np.asarray, state.trainable))
        active.append(np.asarray(state.frozen.state["up/kernel"]["active"]))
    counts = [int(own.sum()) for own in active]
    assert counts[0] == 9
    assert counts[-1] == 2
    assert counts == sorted(counts, reverse=True)
    assert all((later <= before).all() for before, later in itertools.pairwise(active))
    last = np.argmin(counts)
    moved = np.asarray(history[-1]["up/kernel"]["a"] != history[last + 1]["up/kernel"]["a"])
    np.testing.assert_array_equal(moved.any((-1, -2)), active[-1])


def test_the_random_numbers_are_the_usual_librarys():
    """The first ones after seed 0, and the last of a number that 16 does not divide."""
    drawn = normal_numbers(0, (5, 7)).reshape(-1)
    np.testing.assert_allclose(drawn[:4], [-1.1258398, -1.1523602, -0.2505786, -0.4338788], rtol=1e-5)
    assert abs(normal_numbers(3, (200, 50)).std() - 1.0) < 0.02


def test_clusters_are_those_of_lloyds_algorithm_from_the_same_rows():
    w = normal(jax.random.key(5), (40, 17))
    left = np.asarray(first_directions(w, 8, 0).left, np.float64)
    found = np.asarray(clustered(jnp.asarray(left, jnp.float32), 5))
    first = np.random.RandomState(123456789).choice(40, 5, replace=False, p=np.full(40, 1 / 40))
    centers = left[first]
    for _ in range(10):
        labels = np.argmin(((left[:, None] - centers) ** 2).sum(-1), axis=1)
        centers = np.stack([left[labels == own].mean(0) for own in range(5)])
    np.testing.assert_array_equal(found, np.argmin(((left[:, None] - centers) ** 2).sum(-1), axis=1))


# LILY.


def lily(**options):
    method = pj.lily(rank=2, experts=3, scale=0.5, targets=["up"], **options)
    frozen, trainable = method.init(KEY, PARAMS)
    return method, frozen, noisy(trainable)


def test_lily_mixes_its_second_factors_by_all_tokens():
    method, frozen, trainable = lily(stride=2)
    assert {name: array.shape for name, array in trainable["shared"].items()} == {
        "a0": (2, 2, 8),
        "b0": (3, 2, 12),
    }
    x = normal(jax.random.key(4), (3, 2, 5, 8))
    found = pj.adapt(lambda p, x: jnp.einsum("lbti,lio->lbto", x, p["up"]["kernel"]))(
        method.apply(frozen, trainable), x
    )
    a, b = (np.asarray(trainable["shared"][name]) for name in ("a0", "b0"))
    for layer in range(3):
        z = np.asarray(x[layer]) @ a[layer // 2].T
        logits = np.exp(z @ np.asarray(trainable["up/kernel"]["router"][layer]).T)
        shares = (logits / logits.sum(-1, keepdims=True)).mean((0, 1))
        wanted = np.asarray(x[layer]) @ np.asarray(PARAMS["up"]["kernel"][layer])
        wanted = wanted + 0.5 * z @ np.einsum("e,ero->ro", shares, b)
        np.testing.assert_allclose(found[layer], wanted, atol=1e-5)


def test_lily_has_no_weight_that_does_the_same():
    method, frozen, trainable = lily()
    with pytest.raises(PeftError, match="merge: lily adds to 'up/kernel' what depends on the tokens"):
        method.merge(frozen, trainable)
    with pytest.raises(PeftError, match="experts must be 2 or more"):
        pj.lily(experts=1)
    with pytest.raises(PeftError, match="is a lookup table or a convolution"):
        pj.lily(rank=2, targets=["words"]).init(KEY, {"words": {"embedding": jnp.ones((4, 8))}})
