"""Bases of gradients: the three ways against NumPy's float64 decomposition, and what breaks weaker ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import all_but_slow, combined, normal

from peftjax.core.errors import PeftError
from peftjax.optim.bases import (
    captured_energy,
    gram_basis,
    orthonormal_rows,
    start_rows,
    subspace_iteration,
    svd_basis,
)

KEY = jax.random.key(3)
SIDES = ["input", "output"]


def with_spectrum(spectrum, n_in=48, n_out=32, stack=(), seed=0):
    """Random matrices `[*stack, in, out]` with the given singular values, float32."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.normal(size=(*stack, n_in, n_in)))[0][..., :, : len(spectrum)]
    right = np.linalg.qr(random.normal(size=(*stack, n_out, n_out)))[0][..., :, : len(spectrum)]
    return jnp.asarray((left * np.asarray(spectrum)) @ np.swapaxes(right, -1, -2), jnp.float32)


FAST = with_spectrum(0.7 ** np.arange(32), stack=(2,))
FLAT = normal(KEY, (2, 48, 32))


def products(g):
    def left(tree):
        return {path: jnp.einsum("...ki,...io->...ko", q, g[path]) for path, q in tree.items()}

    def right(tree):
        return {path: jnp.einsum("...ko,...io->...ki", w, g[path]) for path, w in tree.items()}

    return left, right


def iterated(g, rank, side, known=None, iterations=2, over=8, seed=0):
    """The subspace iteration on a whole gradient."""
    *stack, n_in, n_out = g.shape
    width, rows = n_in if side == "input" else n_out, min(rank + over, n_in, n_out)
    start = start_rows(jax.random.key(seed), (*stack, rows, width), known)
    left, right = products({"w": g.astype(jnp.float32)})
    passes = (left, right) if side == "input" else (right, left)
    return subspace_iteration(*passes, {"w": start}, iterations, rank)["w"]


WAYS = {"svd": svd_basis, "gram": gram_basis, "subspace": iterated}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
subspace_or_slow = pytest.mark.parametrize("name", all_but_slow(WAYS, ("subspace",)))
way_and_side = pytest.mark.parametrize(("way", "side"), combined(reversed(WAYS.values()), SIDES))


def exact(g, rank, side):
    u, _, vh = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    return np.swapaxes(u[..., :rank], -1, -2) if side == "input" else vh[..., :rank, :]


def projector(basis):
    basis = np.asarray(basis, np.float64)
    return np.swapaxes(basis, -1, -2) @ basis


def assert_orthonormal(rows, tolerance=1e-5):
    rows = np.asarray(rows, np.float64)
    eye = np.broadcast_to(np.eye(rows.shape[-2]), (*rows.shape[:-1], rows.shape[-2]))
    np.testing.assert_allclose(rows @ np.swapaxes(rows, -1, -2), eye, atol=tolerance)


@way_and_side
def test_the_basis_is_the_exact_one_up_to_signs(way, side):
    """Vector by vector, which the order by falling singular value is part of."""
    basis = way(FAST, 5, side)
    assert basis.shape == (2, 5, 48 if side == "input" else 32)
    assert basis.dtype == jnp.float32
    overlaps = np.abs(np.sum(np.asarray(basis) * exact(FAST, 5, side), -1))
    assert_orthonormal(basis)
    np.testing.assert_allclose(overlaps, 1.0, atol=1e-5)


@subspace_or_slow
def test_the_largest_principal_angle_to_the_exact_subspace(name):
    way = WAYS[name]
    cosines = np.linalg.svd(
        np.asarray(way(FAST, 6, "input"), np.float64) @ np.swapaxes(exact(FAST, 6, "input"), 1, 2)
    )[1]
    assert np.sqrt(np.maximum(1 - cosines.min() ** 2, 0)) < 2e-3


@way_and_side
def test_what_is_left_out_is_the_sum_of_the_dropped_squares(way, side):
    dense = np.asarray(FAST[0], np.float64)
    kept = projector(way(FAST, 5, side)[0])
    back = kept @ dense if side == "input" else dense @ kept
    wanted = np.sum((0.7 ** np.arange(5, 32)) ** 2)
    np.testing.assert_allclose(np.sum((dense - back) ** 2), wanted, rtol=1e-4)


@pytest.mark.parametrize(("g", "iterations", "loss"), [(FAST, 2, 1e-5), (FLAT, 2, 0.05), (FLAT, 4, 0.01)])
def test_the_energy_of_two_iterations_beside_the_best(g, iterations, loss):
    """Nothing is lost where the spectrum falls; where it is flat, 5 % with two iterations, 1 % with four."""
    best = captured_energy(g, svd_basis(g, 6, "input"), "input")
    found = captured_energy(g, iterated(g, 6, "input", iterations=iterations, over=6), "input")
    assert (found <= best * (1 + 1e-5)).all()
    assert (found >= best * (1 - loss)).all()


@pytest.mark.slow
def test_a_warm_start_is_better_than_a_random_one():
    known = svd_basis(FLAT + 0.1 * jax.random.normal(jax.random.key(8), FLAT.shape), 6, "input")
    best = captured_energy(FLAT, svd_basis(FLAT, 6, "input"), "input")
    lost = [
        best - captured_energy(FLAT, iterated(FLAT, 6, "input", start, iterations=1, over=2), "input")
        for start in (known, None)
    ]
    assert (lost[0] < 0.2 * lost[1]).all()


def test_no_known_basis_yet_is_a_random_start():
    start = orthonormal_rows(start_rows(KEY, (2, 6, 48), jnp.zeros((2, 4, 48))))
    np.testing.assert_allclose(
        projector(start), projector(orthonormal_rows(start_rows(KEY, (2, 6, 48)))), atol=1e-5
    )


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_n_iterations_take_2n_plus_1_products(iterations):
    calls = []
    left, right = products({"w": FAST})
    counted = [lambda tree, p=p: calls.append(p) or p(tree) for p in (left, right)]
    subspace_iteration(*counted, {"w": start_rows(KEY, (2, 6, 48))}, iterations, 4)
    assert len(calls) == 2 * iterations + 1


@pytest.mark.slow
def test_one_call_serves_matrices_of_many_shapes_and_ranks():
    other = with_spectrum([3.0, 2.0, 1.0], 10, 7)
    left, right = products({"a": FAST, "b": other})
    starts = {"a": start_rows(KEY, (2, 12, 48)), "b": start_rows(KEY, (5, 10))}
    found = subspace_iteration(left, right, starts, 2, {"a": 4, "b": 2})
    np.testing.assert_allclose(projector(found["a"]), projector(exact(FAST, 4, "input")), atol=1e-3)
    np.testing.assert_allclose(projector(found["b"]), projector(exact(other, 2, "input")), atol=1e-4)
    assert subspace_iteration(left, right, starts, 1, 9)["b"].shape == (5, 10)


@pytest.mark.slow
@each_way
def test_a_stack_is_its_matrices_one_by_one(way):
    g = FAST.reshape(1, 2, 48, 32)
    singly = [way(g[0, n], 4, "output") for n in range(2)]
    np.testing.assert_allclose(projector(way(g, 4, "output")[0]), projector(jnp.stack(singly)), atol=1e-4)


@pytest.mark.parametrize(("way", "shape"), combined(reversed(WAYS.values()), [(48, 32), (20, 20)]))
def test_the_sides_change_places_with_a_transposition(way, shape):
    g = with_spectrum(0.6 ** np.arange(20), *shape)
    np.testing.assert_allclose(projector(way(g, 4, "input")), projector(way(g.T, 4, "output")), atol=1e-4)


@each_way
def test_a_zero_gradient_gives_orthonormal_rows(way):
    assert_orthonormal(way(jnp.zeros((2, 12, 8)), 3, "input"))


@way_and_side
def test_a_rank_above_that_of_the_gradient_gives_orthonormal_rows(way, side):
    g = with_spectrum([2.0, 1.0], 12, 8)
    basis = way(g, 5, side)
    assert_orthonormal(basis)
    np.testing.assert_allclose(captured_energy(g, basis, side), 1.0, atol=1e-5)


@way_and_side
def test_a_condition_of_a_million(way, side):
    g = with_spectrum(np.logspace(0, -6, 32))
    basis = way(g, 16, side)
    assert_orthonormal(basis)
    best = captured_energy(g, jnp.asarray(exact(g, 16, side), jnp.float32), side)
    np.testing.assert_allclose(captured_energy(g, basis, side), best, atol=1e-6)
    leading = np.abs(np.sum(np.asarray(basis) * exact(g, 16, side), -1))[:8]
    np.testing.assert_allclose(leading, 1.0, atol=1e-4)


def test_the_gram_matrix_loses_small_directions_that_the_svd_keeps():
    """In float32 those below sqrt(eps) of the largest: the limit that the module names."""
    g = with_spectrum([1.0, 1e-2, 1e-5, 1e-7])
    third = [
        np.abs(np.asarray(way(g, 3, "input"))[2] @ exact(g, 3, "input")[2]) for way in (svd_basis, gram_basis)
    ]
    assert third[0] > 0.99
    assert third[1] < 0.9


@subspace_or_slow
def test_the_whole_side(name):
    way = WAYS[name]
    basis = way(FLAT, 32, "output")
    assert_orthonormal(basis)
    np.testing.assert_allclose(captured_energy(FLAT, basis, "output"), 1.0, atol=1e-5)


@subspace_or_slow
def test_bfloat16_gradients(name):
    way = WAYS[name]
    rounded = FAST.astype(jnp.bfloat16)
    basis = way(rounded, 4, "input")
    assert basis.dtype == jnp.float32
    np.testing.assert_allclose(
        projector(basis), projector(exact(rounded.astype(jnp.float32), 4, "input")), atol=1e-3
    )


@subspace_or_slow
def test_sharded_gradients(name):
    way = WAYS[name]
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.device_put(FAST, NamedSharding(mesh, P(None, "data", "tensor")))
    found = jax.jit(way, static_argnums=(1, 2))(spread, 4, "input")
    np.testing.assert_allclose(found, way(FAST, 4, "input"), atol=1e-5)


def test_the_workspace_is_that_of_one_matrix():
    """Six times the layers need no more; in float32, as a CPU widens a bfloat16 stack before the loop."""

    def temporaries(layers):
        g = jax.ShapeDtypeStruct((layers, 64, 48), jnp.float32)
        compiled = jax.jit(lambda g: gram_basis(g, 4, "input")).lower(g).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(12) == temporaries(2)


def test_the_energy_of_zero_and_of_whole_bases():
    g = jnp.stack([jnp.zeros((6, 4)), jnp.ones((6, 4))])
    basis = jnp.broadcast_to(jnp.eye(3, 6), (2, 3, 6))
    np.testing.assert_allclose(captured_energy(g, basis, "input"), [1.0, 0.5])


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    with pytest.raises(PeftError, match="rank 9 does not fit matrices of 12 x 8"):
        svd_basis(jnp.ones((12, 8)), 9, "input")
    with pytest.raises(PeftError, match="rank 0"):
        gram_basis(jnp.ones((12, 8)), 0, "input")
    with pytest.raises(PeftError, match="5 rows of 4 entries"):
        orthonormal_rows(jnp.ones((5, 4)))
    with pytest.raises(PeftError, match="iterations must be 0 or more, got -1"):
        subspace_iteration(lambda q: q, lambda w: w, jnp.eye(3), -1, 2)
