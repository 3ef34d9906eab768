"""BitStack: what blocks leave, how many a budget keeps, and weights that are sums of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.core.tree import named_leaves
from peftjax.methods.quantization.bitstack import block_order, decompose, within_budget
from peftjax.testing.weights import check_weight

RNG = np.random.default_rng(0)
SIZES = np.array([1.0, 3.0], np.float32)[:, None, None]  # of the layers
PARAMS = {
    "blocks": {"up": {"kernel": jnp.asarray(RNG.standard_normal((2, 24, 20)) * SIZES, jnp.float32)}},
    "down": {"kernel": jnp.asarray(2 * RNG.standard_normal((20, 8)), jnp.float32)},
}
UP, DOWN = "blocks/up/kernel", "down/kernel"
ONE_UP, ONE_DOWN = 24 * 3 + 2 * 2 * (24 + 20), 20 * 1 + 2 * 2 * (20 + 8)
EACH_ONCE = 2 * ONE_UP + ONE_DOWN


@pytest.fixture(scope="module")
def made():
    return decompose(PARAMS, blocks=4, rank=2)


def model(params, x):
    for layer in range(2):
        x = jnp.tanh(x @ params["blocks"]["up"]["kernel"][layer])[:, :20] @ jnp.eye(20, 24)
    return x[:, :20] @ params["down"]["kernel"]


def test_each_block_is_the_sign_of_what_is_left_and_its_size_to_rank_r(made):
    """Against NumPy's decomposition, layer by layer, with factors rounded to float16."""
    w = named_leaves(made)[UP]
    for layer in range(2):
        rest = np.asarray(PARAMS["blocks"]["up"]["kernel"][layer])
        norms = [np.linalg.norm(rest)]
        for block in range(4):
            sign = np.where(rest >= 0, 1, -1)
            u, s, vt = np.linalg.svd(np.abs(rest))
            wanted = (u[:, :2] * s[:2]) @ vt[:2]
            bits = np.unpackbits(np.asarray(w.signs[layer, block]), axis=-1)[:, :20]  # high bit first
            np.testing.assert_array_equal(bits, sign > 0)
            product = np.asarray(w.a[layer, block], np.float32).T @ np.asarray(w.b[layer, block], np.float32)
            np.testing.assert_allclose(product, wanted, atol=3e-3 * np.abs(wanted).max())
            rest = rest - sign * product
            norms.append(np.linalg.norm(rest))
        assert (np.diff(norms) < 0).all()
        dense = np.asarray(PARAMS["blocks"]["up"]["kernel"][layer]) - rest
        np.testing.assert_allclose(w.dense()[layer], dense, atol=1e-5)


@pytest.mark.slow
def test_residuals_of_normal_numbers_are_those_measured_before():
    """Of 256 x 256, rank 16; a decomposition of random directions comes close."""
    params = {"w": jnp.asarray(RNG.standard_normal((256, 256)), jnp.float32)}
    golden = (0.539, 0.291, 0.165, 0.098)
    for iterations, slack in ((None, 0.01), (2, 0.02)):
        w = decompose(params, targets="w", blocks=4, rank=16, iterations=iterations)["w"]
        for blocks, wanted in enumerate(golden, 1):
            few = within_budget({"w": w}, blocks * (256 * 32 + 2 * 16 * 512))["w"]
            assert few.blocks == blocks
            left = np.linalg.norm(params["w"] - few.dense()) / np.linalg.norm(params["w"])
            assert abs(left - wanted) < slack, (iterations, blocks, left)


@pytest.mark.slow
def test_a_matrix_of_rank_one_needs_one_block_and_input_norms_are_undone():
    one = jnp.outer(jnp.arange(1.0, 9), jnp.array([1.0, -2, 3, 1, 1, -1, 2, 2]))
    made = decompose({"w": one}, targets="w", blocks=1, rank=1)["w"]
    np.testing.assert_allclose(made.dense(), one, rtol=3e-3)
    w, norms = PARAMS["down"]["kernel"], jnp.geomspace(0.1, 10, 20)
    weighted = [
        decompose(PARAMS, targets=[DOWN], blocks=4, rank=2, input_norms=given)["down"]["kernel"].dense()
        for given in (None, {DOWN: norms})
    ]
    errors = [float(jnp.linalg.norm((w - of) * norms[:, None])) for of in weighted]
    assert errors[1] < 0.8 * errors[0]
    whole = decompose(PARAMS, targets=[DOWN], blocks=1, rank=8, input_norms={DOWN: norms})["down"]["kernel"]
    np.testing.assert_allclose(whole.dense(), w, atol=1e-2)


@pytest.mark.slow
def test_a_larger_budget_keeps_what_a_smaller_one_does(made):
    order = block_order(made)
    assert sorted(order) == sorted([(UP, 0), (UP, 1), (DOWN, 0)] * 3)
    assert order[0] == (UP, 1)  # the layer of the largest numbers
    assert all(len(set(order[n : n + 3])) == 3 for n in (0, 3, 6))  # level by level
    counts = []
    for extra in (0, ONE_UP, 2 * ONE_UP + ONE_DOWN, 3 * (2 * ONE_UP + ONE_DOWN)):
        few = named_leaves(within_budget(made, EACH_ONCE + extra))
        up = np.asarray(jnp.any(few[UP].b != 0, (-1, -2)).sum(-1))
        counts.append((*up, few[DOWN].blocks))
        assert few[UP].blocks == few[UP].signs.shape[1] == max(up)
    assert counts[0] == (1, 1, 1)
    assert counts[1] == (1, 2, 1)
    assert counts[2] == (2, 2, 2)
    assert counts[3] == (4, 4, 4)
    with pytest.raises(PeftError, match=f"takes {EACH_ONCE:,} bytes"):
        within_budget(made, EACH_ONCE - 1)
    with pytest.raises(PeftError, match="no weight has blocks"):
        within_budget(PARAMS, 10)


def test_a_loss_decides_the_order(made):
    """One that sees the first layer, and less the small matrix; it is asked once for each and level."""
    seen = []

    def loss(params):
        leaves = named_leaves(params)
        blocks = [np.asarray(jnp.any(leaves[path].b != 0, (-1, -2)).sum(-1)) for path in (UP, DOWN)]
        seen.append((*blocks[0], int(blocks[1])))
        return -10 * blocks[0][0] - blocks[1]

    assert block_order(made, loss)[:3] == [(UP, 0), (DOWN, 0), (UP, 1)]
    assert seen[:3] == [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
    assert len(seen) == 9


@pytest.mark.slow
def test_a_lora_trains_on_blocks_and_merges_into_arrays(made):
    x = jnp.asarray(RNG.standard_normal((3, 24)), jnp.float32)
    few = within_budget(made, EACH_ONCE + 2 * ONE_UP)
    method = pj.chain(pj.bitstack(), pj.lora(rank=2))
    frozen, trainable = method.init(KEY, few)
    assert named_leaves(frozen.params)[UP] is few["blocks"]["up"]["kernel"]
    found = jax.jit(lambda f, t, x: pj.adapt(model)(method.apply(f, t), x))(frozen, trainable, x)
    dense = method.merge(frozen, trainable)
    assert_close(found, model(dense, x))
    np.testing.assert_array_equal(dense["down"]["kernel"], few["down"]["kernel"].dense())
    with pytest.raises(PeftError, match=DOWN):  # a byte has eight outputs
        pj.adapt(lambda p: x[:, :20] @ p["down"]["kernel"][:, :4])(few)
    with pytest.raises(PeftError, match=r"rank 16 is larger than 'blocks/up/kernel', a matrix of 24 x 12"):
        pj.bitstack().init(KEY, {"blocks": {"up": {"kernel": jnp.ones((2, 24, 12))}}})
    with pytest.raises(PeftError, match="is a LowRank of an earlier method"):
        pj.chain(pj.lora(rank=2), pj.bitstack(rank=2)).init(KEY, PARAMS)


@pytest.mark.slow
def test_a_model_uses_it_as_the_dense_array(made):
    check_weight(named_leaves(made)[DOWN])
    check_weight(named_leaves(made)[UP])
