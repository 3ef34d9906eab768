"""BatchEnsemble: each member against the model with its own weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.interpreter import adapt
from peftjax.weights.ensembled import Ensembled
from peftjax.weights.layout import Layout

PARAMS = {
    "up": {"kernel": normal(KEY, (6, 8)) / 2, "bias": jnp.ones(8)},
    "down": {"kernel": normal(KEY, (8, 5)), "bias": jnp.zeros(5)},
}
MEMBERS = 3
X = normal(jax.random.key(1), (4, 7, 6))


def forward(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return h @ params["down"]["kernel"] + params["down"]["bias"]


def started(**options):
    method = pj.batch_ensemble(members=MEMBERS, **options)
    frozen, fresh = method.init(KEY, PARAMS)
    return method, frozen, noisy(fresh)


def outputs(method, frozen, trainable, x):
    return pj.adapt(forward)(method.apply(frozen, trainable), x)


def test_each_member_is_the_model_with_its_own_weights_and_biases():
    method, frozen, trainable = started()
    batch = normal(jax.random.key(2), (MEMBERS * 4, 7, 6))
    got = np.asarray(outputs(method, frozen, trainable, batch)).reshape(MEMBERS, 4, 7, 5)
    for n in range(MEMBERS):
        plain = {}
        for name, own in PARAMS.items():
            r, s, c = (np.asarray(trainable[f"{name}/kernel"][k])[n] for k in ("input", "output", "shift"))
            plain[name] = {"kernel": own["kernel"] * np.outer(r, s), "bias": own["bias"] + c}
        wanted = forward(plain, batch[4 * n : 4 * n + 4])
        np.testing.assert_allclose(got[n], wanted, rtol=1e-4, atol=1e-5)
        member = pj.member_of(frozen, trainable, n)
        np.testing.assert_allclose(member["up"]["kernel"], plain["up"]["kernel"], rtol=1e-5)
        np.testing.assert_allclose(member["down"]["bias"], plain["down"]["bias"], rtol=1e-5)


def test_gradients_are_those_of_each_member_alone():
    method, frozen, trainable = started()

    tiled = jnp.tile(X, (MEMBERS, 1, 1))

    def whole(trainable):
        return jnp.mean(jnp.sin(outputs(method, frozen, trainable, tiled)))

    def alone(trainable, n):
        return jnp.mean(jnp.sin(forward(pj.member_of(frozen, trainable, n), X)))

    got = jax.jit(jax.grad(whole))(trainable)
    wanted = jax.jit(jax.grad(lambda t: sum(alone(t, n) for n in range(MEMBERS)) / MEMBERS))(trainable)
    for path in got:
        for name in got[path]:
            np.testing.assert_allclose(got[path][name], wanted[path][name], rtol=1e-3, atol=1e-6)


def test_members_alike_are_the_model_and_flattened_tokens_belong_to_their_row():
    method, frozen, _ = started()
    fresh = pj.batch_ensemble(members=MEMBERS, noise=0.0).init(KEY, PARAMS)[1]
    tiled = jnp.tile(X, (MEMBERS, 1, 1))
    np.testing.assert_allclose(outputs(method, frozen, fresh, tiled), forward(PARAMS, tiled), atol=1e-5)
    trainable = noisy(fresh)
    flat = outputs(method, frozen, trainable, tiled.reshape(-1, 6))
    np.testing.assert_allclose(flat.reshape(12, 7, 5), outputs(method, frozen, trainable, tiled), atol=1e-5)


@pytest.mark.parametrize("letters", ["iio", "ioo"])
def test_axes_of_several_features(letters):
    shape = (3, 4, 5)
    layout = Layout.parse(letters, shape)
    n, m = layout.matrix
    r, s = normal(KEY, (2, n)), normal(jax.random.key(3), (2, m))
    w, x = normal(KEY, shape), normal(jax.random.key(4), (6, *layout.sizes("i")))
    use = {"iio": "bij,ijo->bo", "ioo": "bi,iop->bop"}[letters]
    got = adapt(lambda w, x: jnp.einsum(use, x, w))(Ensembled(w, r, s, layout), x)
    for k in range(2):
        own = w * (
            r[k].reshape(*layout.sizes("i"), *(1,) * len(layout.sizes("o"))) * s[k].reshape(layout.sizes("o"))
        )
        np.testing.assert_allclose(
            got[3 * k : 3 * k + 3], jnp.einsum(use, x[3 * k : 3 * k + 3], own), rtol=1e-4, atol=1e-5
        )
    # And where the activation meets the outputs.
    back = {"iio": "bo,ijo->bij", "ioo": "bop,iop->bi"}[letters]
    g = normal(jax.random.key(5), (6, *layout.sizes("o")))
    got = adapt(lambda w, g: jnp.einsum(back, g, w))(Ensembled(w, r, s, layout), g)
    own = w * (
        r[1].reshape(*layout.sizes("i"), *(1,) * len(layout.sizes("o"))) * s[1].reshape(layout.sizes("o"))
    )
    np.testing.assert_allclose(got[3:], jnp.einsum(back, g[3:], own), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_says_so():
    method, frozen, trainable = started()
    with pytest.raises(
        pj.PeftError, match=r"3 members share a batch, but this layer sees an activation \(4, 7, 6\)"
    ):
        outputs(method, frozen, trainable, X)
    with pytest.raises(pj.PeftError, match="the members of an ensemble have no single weight"):
        method.merge(frozen, trainable)
    with pytest.raises(pj.PeftError, match="member_of: there is no member 3 of 3"):
        pj.member_of(frozen, trainable, 3)
    bare = {"up": {"kernel": PARAMS["up"]["kernel"]}}
    with pytest.raises(pj.PeftError, match="member_of: the layer of 'up/kernel' has no bias"):
        pj.member_of(*pj.batch_ensemble(members=2).init(KEY, bare), 0)
