"""My3DGen: ranks by window, the released order of numbers, and a modulated convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.core import tree

IN, OUT, K = 4, 6, 3
PARAMS = {"conv": {"kernel": normal(KEY, (K, K, IN, OUT))}, "style": {"kernel": normal(KEY, (5, IN))}}
X, STYLE = normal(jax.random.key(1), (2, 5, 5, IN)), normal(jax.random.key(2), (2, 5))


def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_ranks_scales_and_counts_are_the_papers():
    method = pj.my3dgen(rank=2, alpha=3.0)
    frozen, fresh = method.init(KEY, PARAMS)
    found = {target.path: (target.rank, target.scale) for target in frozen.plan}
    assert found == {"conv/kernel": (2 * K, 1.5), "style/kernel": (2, 1.5)}
    assert tree.count(fresh) == 2 * K * (IN * K**2 + OUT) + 2 * (5 + IN)
    np.testing.assert_allclose(method.merge(frozen, fresh)["conv"]["kernel"], PARAMS["conv"]["kernel"])
    torch_like = {"conv": {"weight": normal(KEY, (OUT, IN, 2, 5))}}
    assert pj.my3dgen().init(KEY, torch_like)[0].plan[0].rank == 2
    again = pj.build(pj.describe(method))
    assert again.init(KEY, PARAMS)[0].plan == frozen.plan


def test_a_convolutions_change_is_theirs_in_another_order():
    method = pj.my3dgen(rank=1, alpha=2.0, targets=["conv"])
    frozen, fresh = method.init(KEY, PARAMS)
    trainable = noisy(fresh)
    own = {name: np.asarray(value) for name, value in trainable["conv/kernel"].items()}
    a = own["a"].reshape(K, K, K, IN).transpose(0, 3, 1, 2).reshape(K, IN * K * K)  # [r·k, in·k·k]
    theirs = 2.0 * (own["b"].T @ a).reshape(OUT, IN, K, K)  # view(B A)
    change = method.merge(frozen, trainable)["conv"]["kernel"] - PARAMS["conv"]["kernel"]
    np.testing.assert_allclose(change, theirs.transpose(2, 3, 1, 0), rtol=1e-3, atol=1e-5)


def modulated(params, x, w):
    style = w @ params["style"]["kernel"] + 1.0
    kernel = params["conv"]["kernel"]
    squares = jnp.einsum("hwio,bi->bo", kernel**2, style**2)
    return convolve(x * style[:, None, None], kernel) / jnp.sqrt(squares + 1e-8)[:, None, None]


def test_a_modulated_convolution_scales_what_goes_in_and_out():
    method = pj.my3dgen(rank=1)
    frozen, fresh = method.init(KEY, PARAMS)
    trainable = noisy(fresh)
    merged = method.merge(frozen, trainable)
    wanted = []
    for x, w in zip(X, STYLE):
        own = merged["conv"]["kernel"] * (w @ merged["style"]["kernel"] + 1.0)[None, None, :, None]
        wanted.append(convolve(x[None], own / jnp.sqrt(jnp.sum(own**2, (0, 1, 2)) + 1e-8))[0])
    run = pj.adapt(modulated, allow_dense=["integer_pow|square"])
    got = jax.jit(run)(method.apply(frozen, trainable), X, STYLE)
    np.testing.assert_allclose(got, jnp.stack(wanted), rtol=1e-3, atol=1e-4)
    with pytest.raises(pj.PeftError, match="conv/kernel"):
        pj.adapt(modulated)(method.apply(frozen, trainable), X, STYLE)


def test_a_rank_that_is_too_large_names_the_weight():
    with pytest.raises(
        pj.PeftError, match="my3dgen: rank 9 is larger than 'conv/kernel', a matrix of 36 x 6"
    ):
        pj.my3dgen(rank=3).init(KEY, PARAMS)
