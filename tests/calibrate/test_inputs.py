"""Statistics of what enters linear layers: against the activations themselves, in scanned layers too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal

import peftjax as pj

W1, W2 = normal(KEY, (5, 4)), normal(jax.random.key(1), (4, 3))
PARAMS = {"up": {"kernel": W1}, "down": {"kernel": W2}, "lost": {"kernel": W2}}
BATCHES = [normal(jax.random.key(n), (2, 6, 5)) for n in (2, 3)]


def forward(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"])
    return h @ params["down"]["kernel"], jnp.sum(h, dtype=jnp.float32).astype(jnp.int32)


def check(stats, path, rows):
    rows = np.concatenate([np.reshape(own, (-1, own.shape[-1])) for own in rows])
    assert stats.counts[path] == len(rows)
    np.testing.assert_allclose(stats.means[path], rows.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats.moments[path], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats.covariances[path], np.cov(rows.T, ddof=0), rtol=1e-3, atol=1e-5)


def test_they_are_those_of_the_activations_and_of_the_rows_that_count():
    stats = pj.calibrate.input_statistics(forward, PARAMS, BATCHES, exclude=["lost"])
    assert stats.counts.keys() == {"up/kernel", "down/kernel"}
    check(stats, "up/kernel", BATCHES)
    check(stats, "down/kernel", [np.tanh(np.asarray(x @ W1)) for x in BATCHES])
    masks = [np.arange(12).reshape(2, 6) % 5 < 3, np.arange(12).reshape(2, 6) < 7]
    stats = pj.calibrate.input_statistics(
        lambda params, batch: forward(params, batch[0]),
        PARAMS,
        [(x, jnp.asarray(mask)) for x, mask in zip(BATCHES, masks)],
        targets=["down"],
        mask=lambda batch: batch[1],
    )
    check(stats, "down/kernel", [np.tanh(np.asarray(x @ W1))[mask] for x, mask in zip(BATCHES, masks)])


def test_what_cannot_be_observed_says_so():
    observe = pj.calibrate.input_statistics
    with pytest.raises(pj.PeftError, match="no row of 'lost/kernel' reaches the model's output"):
        observe(forward, PARAMS, BATCHES)
    with pytest.raises(pj.PeftError, match="there is no batch"):
        observe(forward, PARAMS, [], exclude=["lost"])
    with pytest.raises(pj.PeftError, match=r"a mask of shape \(2, 5\) does not fit"):
        observe(forward, PARAMS, BATCHES, exclude=["lost"], mask=lambda batch: jnp.ones((2, 5)))
    with pytest.raises(pj.PeftError, match=r"up/kernel"):  # that is the transposed use
        observe(lambda params, x: x @ params["up"]["kernel"].T, PARAMS, [BATCHES[0][..., :4]], targets=["up"])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4, name="up")(x)), None


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_each_layer_of_a_scan_has_its_own(remat):
    layer = nn.remat(Layer, prevent_cse=False) if remat else Layer
    stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = BATCHES[0][..., :4]
    params = stack.init(KEY, x, None)["params"]
    stats = pj.calibrate.input_statistics(
        lambda params, x: stack.apply({"params": params}, x, None)[0], params, [x]
    )
    for n in range(3):
        own = jax.tree.map(lambda leaf, n=n: leaf[n], stats.moments)["up/kernel"]
        rows = np.asarray(x).reshape(-1, 4)
        np.testing.assert_allclose(own, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
        x = jnp.tanh(x @ params["up"]["kernel"][n] + params["up"]["bias"][n])
