"""What LoRA's variants do beside LoRA: where they act, what backward reads, and which numbers are drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal
from tiny_models import BLOCKS, tiny

import peftjax as pj
from peftjax.core import tree
from peftjax.methods.lowrank._invocation import invoked
from peftjax.methods.lowrank.monteclora import deviation, mixture
from peftjax.models.decoder import DecoderConfig, decoder


def test_the_last_invocation_of_each_row_or_segment_counts():
    ids = jnp.array([[5, 1, 2, 7, 1, 2, 9], [1, 3, 2, 1, 0, 0, 1]])
    found = np.asarray(invoked(ids, [1, 2])).astype(int)
    assert found.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0] * 7]
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2]])
    found = np.asarray(invoked(ids, [1, 2], segments)).astype(int)
    assert found.tolist() == [[0, 1, 1, 1, 1, 1, 1], [0] * 7]
    # An invocation that goes over the end of a segment is none.
    assert not np.asarray(invoked(ids, [7, 1], segments)).any()


def causal():
    """The tiny decoder with an output layer over its vocabulary."""
    model = tiny("backbone").forward
    config = dataclasses.replace(model.config, labels=())
    assert isinstance(config, DecoderConfig)
    made = decoder(config, head="causal_lm")
    return made, made.init(KEY)


def test_alora_leaves_the_tokens_before_its_invocation_and_generates_on_behind_it():
    model, params = causal()
    method = pj.alora(rank=2, invocation_tokens=[7, 3], targets=["query", "value", "down"])
    frozen, trainable = method.init(KEY, params)
    adapted = method.apply(frozen, noisy(trainable, scale=0.5))
    ids = jnp.array([[4, 5, 7, 3, 6, 1], [4, 5, 7, 2, 6, 1]])
    told = method.model(model)
    run = jax.jit(pj.adapt(lambda params, ids: told(params, {"input_ids": ids}).dense()))
    ours, base = np.asarray(run(adapted, ids)), np.asarray(run(params, ids))
    np.testing.assert_allclose(ours[0, :2], base[0, :2], atol=1e-6)
    np.testing.assert_allclose(ours[1], base[1], atol=1e-6)
    assert np.abs(ours[0, 2:] - base[0, 2:]).max(-1).min() > 1e-3
    # A token at a time, each behind what was generated, as all of them at once.
    new = pj.generate(told, adapted, {"input_ids": ids}, max_new_tokens=3).tokens
    whole = jnp.concatenate([ids, new], axis=1)
    again = np.asarray(run(adapted, whole))[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert np.asarray(new).tolist() == again.tolist()
    with pytest.raises(pj.PeftError, match="it is not known which tokens are active"):
        pj.adapt(model)(adapted, {"input_ids": ids})
    with pytest.raises(pj.PeftError, match="depends on the tokens of a call"):
        method.merge(frozen, trainable)
    with pytest.raises(pj.PeftError, match="lies outside the blocks"):
        pj.alora(rank=2, invocation_tokens=[7], targets=r".*embedding").init(KEY, params)


def test_replicated_layers_share_their_weights_and_have_factors_of_their_own():
    model = tiny("backbone")
    method = pj.chain(pj.layer_replication(ranges=[(0, 4), (2, BLOCKS)]), pj.lora(rank=2, targets=["query"]))
    frozen, trainable = method.init(KEY, model.params)
    path, layers = "blocks/attention/query/kernel", [0, 1, 2, 3, *range(2, BLOCKS)]
    assert trainable["lora"][path]["a"].shape[0] == len(layers)
    assert tree.named_leaves(frozen.params)[path].distinct.shape[0] == BLOCKS
    trained = noisy(trainable, scale=0.3)
    merged = method.merge(frozen, trained)
    base = np.asarray(tree.named_leaves(model.params)[path])[layers]
    a, b = (np.asarray(trained["lora"][path][name]) for name in ("a", "b"))
    change = 8.0 * np.einsum("lri,lro->lio", a, b).reshape(base.shape)
    np.testing.assert_allclose(tree.named_leaves(merged)[path], base + change, atol=1e-5)
    run = jax.jit(lambda params: pj.adapt(method.model(model.forward))(params, model.batch))
    np.testing.assert_allclose(run(method.apply(frozen, trained)), run(merged), atol=1e-5)
    with pytest.raises(pj.PeftError, match="a range ends at 7, and the model has 6 layers"):
        pj.layer_replication(ranges=[(0, BLOCKS + 1)]).init(KEY, model.params)
    quantized = pj.chain(pj.nf4(targets=["query"]), pj.layer_replication(ranges=[(0, 2), (1, 3)]))
    with pytest.raises(pj.PeftError, match="which has no plain layers to repeat"):
        quantized.init(KEY, model.params)


def test_velora_reads_its_gradient_from_what_it_keeps():
    x, w = normal(KEY, (2, 3, 10)), normal(jax.random.key(1), (10, 6))
    params = {"up": {"kernel": w}}
    method = pj.velora(rank=2, groups=4, strength=0.5, targets=["up"])
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable, scale=0.5)
    plain = pj.lora(rank=2, targets=["up"])

    def loss(method, trainable, x):
        run = pj.adapt(lambda params, x: jnp.sum(jnp.sin(x @ params["up"]["kernel"])))
        return run(method.apply(frozen, trainable), x)

    ours = jax.grad(loss, (1, 2))(method, trainable, x)
    exact = jax.grad(loss, (1, 2))(plain, trainable, x)
    np.testing.assert_allclose(ours[1], exact[1], atol=1e-5)
    np.testing.assert_allclose(ours[0]["up/kernel"]["b"], exact[0]["up/kernel"]["b"], atol=1e-5)
    # By hand: four parts of three numbers, the last two of which are filled up.
    a, b, scale = *(np.asarray(trainable["up/kernel"][name]) for name in ("a", "b")), 16.0 / 2
    rows = np.asarray(x).reshape(-1, 10)
    parts = np.pad(rows, [(0, 0), (0, 2)]).reshape(-1, 4, 3)
    v = parts.mean((0, 1)) / np.linalg.norm(parts.mean((0, 1)))
    stands_for = 0.5 * ((parts @ v)[..., None] * v).reshape(-1, 12)[:, :10]
    g = np.cos(rows @ np.asarray(w) + scale * rows @ a.T @ b)
    np.testing.assert_allclose(ours[0]["up/kernel"]["a"], scale * (g @ b.T).T @ stands_for, atol=1e-4)


def test_velora_drops_out_what_it_compresses():
    params = {"up": {"kernel": normal(KEY, (12, 6))}}
    x = normal(jax.random.key(1), (5, 12))
    method = pj.velora(rank=2, groups=12, dropout=0.5, direction="fixed", targets=["up"])
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable, scale=0.5)
    plain = pj.lora(rank=2, dropout=0.5, targets=["up"])

    def loss(method, trainable):
        run = pj.adapt(lambda params, x: jnp.sum(jnp.sin(x @ params["up"]["kernel"])))
        return run(method.apply(frozen, trainable, key=KEY), x)

    # Groups of one number are kept as they are, so that the gradients are LoRA's under the same mask.
    ours, exact = (jax.value_and_grad(loss, 1)(one, trainable) for one in (method, plain))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(exact)):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_monteclora_trains_under_noise_of_the_size_that_it_learns():
    params = {"up": {"kernel": jnp.zeros((2000, 3))}}
    method = pj.monteclora(rank=3, alpha=3.0, samples=4, noise=0.1, targets=["up"])
    frozen, trainable = method.init(KEY, params)
    slots = trainable["up/kernel"]
    slots |= {"a": jnp.zeros_like(slots["a"]), "b": jnp.eye(3), "t": jnp.array([-0.5, 0.0, 0.5])}
    noise = np.asarray(method.apply(frozen, trainable, key=KEY)["up"]["kernel"].dense())
    assert not np.asarray(method.apply(frozen, trainable)["up"]["kernel"].dense()).any()
    assert not np.array_equal(
        noise, method.apply(frozen, trainable, key=jax.random.key(1))["up"]["kernel"].dense()
    )
    # Each column has the deviation of its direction, drawn once: between them the ratio of the mixture.
    sizes = noise.std(0) / 0.1
    assert np.all(sizes > 0.05)
    assert np.all(sizes < 6.0)
    weights = np.asarray(mixture(slots["c"], jnp.zeros(4)))
    np.testing.assert_allclose(weights.sum(), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights, np.exp(slots["c"]) / np.exp(slots["c"]).sum(), atol=1e-6)
    np.testing.assert_allclose(deviation(jnp.array([0.5]), jnp.array([4.0])), [2.0 * np.exp(0.5)], rtol=1e-6)


def test_blocks_of_bdlora_are_those_of_a_block_diagonal_lora():
    params = {"up": {"kernel": normal(KEY, (8, 12))}, "down": {"kernel": normal(KEY, (12, 8))}}
    method = pj.bdlora(rank=4, alpha=4.0, blocks=2, side_pattern={"down": "inputs"})
    frozen, trainable = method.init(KEY, params)
    shapes = jax.tree.map(jnp.shape, trainable)
    assert shapes == {"up/kernel": {"a": (4, 8), "b": (2, 12)}, "down/kernel": {"a": (4, 6), "b": (4, 8)}}
    trained = noisy(trainable, scale=0.5)

    def diagonal(blocks):
        return np.asarray(jax.scipy.linalg.block_diag(*blocks))

    merged = method.merge(frozen, trained)
    up, down = (jax.tree.map(np.asarray, trained[f"{name}/kernel"]) for name in ("up", "down"))
    change = up["a"].T @ diagonal(np.split(up["b"], 2, axis=1))
    np.testing.assert_allclose(merged["up"]["kernel"], params["up"]["kernel"] + change, atol=1e-5)
    change = diagonal(np.split(down["a"], 2, axis=0)).T @ down["b"]
    np.testing.assert_allclose(merged["down"]["kernel"], params["down"]["kernel"] + change, atol=1e-5)
    with pytest.raises(pj.PeftError, match="3 blocks do not divide rank 4"):
        pj.bdlora(rank=4, blocks=3).init(KEY, params)
    with pytest.raises(pj.PeftError, match="pattern 'gate' matched no target"):
        pj.bdlora(rank=4, side_pattern={"gate": "inputs"}).init(KEY, params)


def test_kasa_cuts_the_smallest_directions_and_penalizes_its_own():
    params = {"up": {"kernel": normal(KEY, (8, 5))}}
    method = pj.kasa(rank=2, beta=0.1, gamma=0.2)
    frozen, trainable = method.init(KEY, params)
    sizes = np.linalg.svd(np.asarray(params["up"]["kernel"]), compute_uv=False)
    cut = np.linalg.svd(np.asarray(method.merge(frozen, trainable)["up"]["kernel"]), compute_uv=False)
    np.testing.assert_allclose(cut, [*sizes[:3], 0, 0], atol=1e-5)
    trained = noisy(trainable, scale=0.5)
    zeros = jax.tree.map(jnp.zeros_like, trained)

    def penalty(slots):
        def excess(f):
            return jnp.linalg.norm(f @ f.T - jnp.eye(2))

        return 0.1 * jnp.sum(slots["d"] ** 2) + 0.2 * (excess(slots["a"]) + excess(slots["b"]))

    tx = method.optimizer(optax.sgd(1.0))
    updates, _ = tx.update(zeros, tx.init(trained), trained, frozen=frozen)
    wanted = jax.grad(penalty)(trained["up/kernel"])
    for name, value in updates["up/kernel"].items():
        np.testing.assert_allclose(-value, wanted[name], atol=1e-5)
    with pytest.raises(pj.PeftError, match="rank 5 leaves nothing"):
        pj.kasa(rank=5).init(KEY, params)
