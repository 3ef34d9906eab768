"""LAMA: its distributions against the bilinear form, and what they ignore."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, noisy, normal
from tiny_models import TOKENS, tiny

import peftjax as pj
from peftjax.core import tree
from peftjax.methods.side.lama import attention

D, M, S = 6, 3, 5
OWN = {
    "context": normal(KEY, (D,)),
    "left": normal(jax.random.key(1), (D, M)),
    "right": normal(jax.random.key(2), (D, M)),
}
MEAN = {name: own for name, own in OWN.items() if name != "context"}
H = normal(jax.random.key(3), (2, S, D))
MASK = jnp.array([[True] * S, [True] * 3 + [False] * 2])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("context", ["trained", "mean"])
def test_each_head_has_an_affinity_of_rank_1(context, normalize):
    own, mask, h = dict(OWN), np.asarray(MASK), np.asarray(H)
    asked = np.broadcast_to(OWN["context"], (2, D))
    if context == "mean":
        del own["context"]
        asked = (h * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    got = attention(own, H, MASK, normalize=normalize)
    scores = np.stack(
        [
            np.tanh(np.einsum("bd,de,bse->bs", asked, np.outer(OWN["left"][:, m], OWN["right"][:, m]), h))
            for m in range(M)
        ],
        axis=1,
    )
    if normalize:
        scores = scores / np.linalg.norm(scores, axis=1, keepdims=True)
    wanted = np.exp(scores) * mask[:, None]
    np.testing.assert_allclose(got, wanted / wanted.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_rows_sum_to_one_padding_gets_none_and_tokens_have_no_order():
    got = np.asarray(attention(OWN, H, MASK, normalize=True))
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-5)
    assert (got[1, :, 3:] == 0).all()
    order = np.array([3, 0, 4, 1, 2])
    turned = attention(OWN, H[:, order], MASK[:, order], normalize=True)
    np.testing.assert_allclose(turned, got[:, :, order], rtol=1e-5)
    changed = attention(MEAN, H.at[1, 3:].set(7.0), MASK, normalize=True)
    np.testing.assert_allclose(changed, attention(MEAN, H, MASK, normalize=True), rtol=1e-6)


def test_only_the_products_of_context_and_left_matter():
    one = {**OWN, "context": jnp.array([1.0, *[0.0] * (D - 1)])}
    query = OWN["context"] @ OWN["left"]
    one["left"] = jnp.zeros((D, M)).at[0].set(query)
    got, wanted = (attention(params, H, None, normalize=True) for params in (one, OWN))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    def value(own):
        weights = attention(own, H, MASK, normalize=True)
        return jnp.sum(jnp.sin(3.0 * jnp.einsum("bms,bsd->bmd", weights, H)))

    value = jax.jit(value)
    grads = jax.jit(jax.grad(value))(OWN)
    for name in OWN:
        way = normal(jax.random.key(9), OWN[name].shape)
        at = [float(value({**OWN, name: OWN[name] + step * way})) for step in (1e-2, -1e-2)]
        np.testing.assert_allclose((at[0] - at[1]) / 2e-2, np.sum(grads[name] * way), rtol=2e-2, atol=1e-2)


@pytest.mark.slow
def test_logits_come_from_the_pooled_tokens_and_train_beside_a_method_of_the_blocks():
    model, params = tiny("encoder classifier").forward, tiny("encoder classifier").params
    batch = {"input_ids": TOKENS, "attention_mask": jnp.array([[1] * 5, [1] * 3 + [0] * 2])}
    method = pj.chain(pj.lora(rank=2, targets=["value"]), pj.lama(heads=M))
    frozen, fresh = method.init(KEY, params)
    width, classes = params["head"]["classifier"]["kernel"].shape
    assert tree.count(fresh["lama"]) == 2 * M * width + (M * width + 1) * classes
    trainable = noisy(fresh)
    run = method.model(model)

    @jax.jit
    def logits(trainable, batch):
        return pj.adapt(run)(method.apply(frozen, trainable), batch)

    adapted = pj.lora(rank=2, targets=["value"]).merge(*pj.lora(rank=2, targets=["value"]).init(KEY, params))
    hidden, context = model.run_embed(adapted, batch)
    own = {"lora": fresh["lora"], "lama": trainable["lama"]}
    hidden = model.run_blocks(adapted, hidden, context)
    pooled = jnp.einsum("bms,bsd->bmd", attention(own["lama"], hidden, context.mask, normalize=True), hidden)
    layer = own["lama"]["classifier"]
    wanted = pooled.reshape(2, -1) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(logits(own, batch), wanted, rtol=1e-3, atol=1e-4)
    grads = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(logits(t, batch)))))(trainable)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_what_does_not_fit_says_so():
    with pytest.raises(pj.PeftError, match="lama takes the place of a model's classifier"):
        pj.lama().init(KEY, tiny("encoder").params)
    with pytest.raises(pj.PeftError, match="lama takes the place of a model's classifier"):
        pj.lama().model(tiny("encoder").forward)
    with pytest.raises(pj.PeftError, match="lama: heads must be positive"):
        pj.lama(heads=0)
    with pytest.raises(pj.PeftError, match="lama: context must be one of mean, trained"):
        pj.lama(context="max")
