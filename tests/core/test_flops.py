"""FLOPs of traced programs, against counts by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from peftjax.core import primitives
from peftjax.planner.flops import Flops, count_flops

N, K, M = 6, 4, 5
X, W = jax.ShapeDtypeStruct((N, K), jnp.float32), jax.ShapeDtypeStruct((K, M), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8 * 8 * 8


def flops(fn, *args, platform="cpu"):
    return count_flops(jax.make_jaxpr(fn)(*args), platform)


def test_a_product_and_its_two_gradients():
    assert flops(jnp.dot, X, W) == Flops(2 * N * K * M)
    loss = lambda x, w: jnp.sum(jnp.sin(x @ w))
    assert flops(jax.grad(loss, (0, 1)), X, W).total == 3 * 2 * N * K * M
    assert flops(jax.grad(loss, 1), X, W).total == 2 * 2 * N * K * M


def test_a_batched_product():
    x, w = jnp.ones((3, N, K)), jnp.ones((3, K, M))
    assert flops(lambda x, w: jnp.einsum("bnk,bkm->bnm", x, w), x, w).total == 3 * 2 * N * K * M


def test_a_scan_counts_every_turn_and_remat_what_is_made_again():
    def run(w, x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=7)[0].sum()

    def run_again(w, x):
        body = jax.checkpoint(lambda x, _: (jnp.sin(x @ w), None))
        return jax.lax.scan(body, x, length=7)[0].sum()

    assert flops(run, SQUARE, SQUARE).total == 7 * ONE
    assert flops(jax.grad(run), SQUARE, SQUARE).total == 3 * 7 * ONE
    assert flops(jax.grad(run_again), SQUARE, SQUARE).total == 4 * 7 * ONE


def test_remat_of_a_last_product_makes_nothing_again():
    # The backward pass of a linear function needs its input, not its output.
    run = jax.checkpoint(lambda w, x: jnp.sin(x) @ w)
    assert flops(jax.value_and_grad(lambda w, x: run(w, x).sum()), SQUARE, SQUARE).total == 2 * ONE


def test_a_product_that_nothing_needs_is_not_counted():
    def pull(w, x):
        _, back = jax.vjp(lambda w: x @ w, w)
        return back(x)[0]

    assert flops(pull, SQUARE, SQUARE).total == ONE
    assert flops(jax.jit(lambda w, x: (w @ x, w)[1]), SQUARE, SQUARE).total == 0


def test_a_carry_counts_where_a_later_turn_needs_it():
    def turn(carry, _):
        alone, first, second = carry
        return (alone @ alone, first @ first, first + second), second

    run = lambda x: jax.lax.scan(turn, (x, x, x), length=5)
    assert flops(lambda x: run(x)[1], SQUARE).total == 5 * ONE
    assert flops(lambda x: run(x)[0], SQUARE).total == 2 * 5 * ONE


def test_a_ragged_product_and_its_gradients():
    groups = jnp.array([1, 2, 3])
    x, w = jnp.ones((N, K)), jnp.ones((3, K, M))
    assert flops(jax.lax.ragged_dot, x, w, groups).total == 2 * N * K * M
    both = jax.grad(lambda x, w: jnp.sum(jnp.sin(jax.lax.ragged_dot(x, w, groups))), (0, 1))
    assert flops(both, x, w).total == 3 * 2 * N * K * M


def convolve(x, w, stride=1, padding="VALID", groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, 6 * 3),  # 8 places, taps of 3: 6 outputs
        ({"stride": 2}, 3 * 3),
        ({"padding": "SAME"}, 8 * 3 - 2),  # two taps meet the padding
        ({"groups": 2}, 6 * 3),
    ],
)
def test_a_convolution(options, pairs):
    groups = options.get("groups", 1)
    x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))
    forward = lambda x, w: convolve(x, w, **options)
    expected = 2 * 2 * (4 // groups) * 6 * pairs**2
    assert flops(forward, x, w).total == expected
    # Each gradient multiplies the same pairs, whatever zeros the compiler is told to put between.
    both = jax.grad(lambda x, w: jnp.sum(jnp.sin(forward(x, w))), (0, 1))
    assert flops(both, x, w).total == 3 * expected


def test_the_platform_chooses_its_branch_and_else_the_largest_counts():
    twice, once = (lambda x: x @ x @ x), (lambda x: x @ x)
    chosen = lambda x: jax.lax.platform_dependent(x, tpu=twice, default=once)
    assert flops(chosen, SQUARE, platform="tpu").total == 2 * ONE
    assert flops(chosen, SQUARE, platform="cuda").total == ONE
    assert flops(lambda c, x: jax.lax.cond(c, once, twice, x), True, SQUARE).total == 2 * ONE


def test_a_while_counts_one_turn_and_says_so():
    run = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)
    assert flops(run, SQUARE) == Flops(ONE, ("while (one turn counted)",))


def test_a_kernel_counts_its_estimate_or_its_body_at_every_place_of_the_grid():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    rows, whole = pl.BlockSpec((2, 8), lambda i: (i, 0)), pl.BlockSpec((8, 8), lambda i: (0, 0))
    call = partial(
        pl.pallas_call, kernel, grid=(4,), in_specs=[rows, whole], out_specs=rows, out_shape=SQUARE
    )
    estimate = pl.CostEstimate(flops=77, transcendentals=0, bytes_accessed=0)
    assert flops(call(cost_estimate=estimate), SQUARE, SQUARE) == Flops(77)
    assert flops(call(), SQUARE, SQUARE) == Flops(ONE)


def test_an_operation_with_kernels_counts_those_of_the_platform():
    plain = lambda x: [x @ x]
    twice = lambda x: [x @ x + x.T @ x]
    run = primitives.by_platform("test_square", plain, {"tpu": twice})
    assert flops(run, SQUARE, platform="cuda") == Flops(ONE)
    assert flops(run, SQUARE, platform="tpu") == Flops(2 * ONE)


def test_decompositions_are_named():
    assert flops(jnp.linalg.cholesky, SQUARE).uncounted == ("cholesky",)


def test_every_shard_counts():
    mesh, rows = AbstractMesh((2,), ("a",), axis_types=(AxisType.Auto,)), PartitionSpec("a")
    run = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert flops(run, SQUARE, SQUARE).total == ONE
