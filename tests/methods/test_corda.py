"""CorDA: its parts against their definition, and its numbers against PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, noisy, normal

import peftjax as pj

PARAMS = {"up": {"kernel": normal(KEY, (6, 8)) / 3}}
X = normal(jax.random.key(1), (40, 6)) @ normal(jax.random.key(2), (6, 6))
PATH = "up/kernel"


@pytest.fixture(scope="module")
def moments():
    def forward(params, x):
        return x @ params["up"]["kernel"]

    return pj.calibrate.input_statistics(forward, PARAMS, [X[:20], X[20:]]).moments


def product(method):
    frozen, fresh = method.init(KEY, PARAMS)
    scale = frozen.plan[0].scale
    return scale * np.asarray(fresh[PATH]["a"].T @ fresh[PATH]["b"])


@pytest.mark.parametrize("keep", [False, True])
def test_the_parts_are_those_of_the_weight_times_the_moments(keep, moments):
    c = np.asarray(X.T @ X) / 40
    np.testing.assert_allclose(moments[PATH], c, rtol=1e-4, atol=1e-4)
    c = c + 0.05 * np.trace(c) / 6 * np.eye(6)
    u, sizes, vt = np.linalg.svd(c @ np.asarray(PARAMS["up"]["kernel"]), full_matrices=False)
    part = slice(4, 6) if keep else slice(0, 2)
    wanted = np.linalg.inv(c) @ (u[:, part] * sizes[part]) @ vt[part]
    got = product(pj.corda(rank=2, alpha=6.0, moments=moments, keep=keep, damping=0.05))
    np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-4)


def test_all_parts_together_are_the_weight_and_equal_moments_give_its_own_parts(moments):
    np.testing.assert_allclose(product(pj.corda(rank=6, moments=moments)), PARAMS["up"]["kernel"], atol=1e-4)
    even = {PATH: 3.0 * jnp.eye(6)}
    u, sizes, vt = np.linalg.svd(np.asarray(PARAMS["up"]["kernel"]), full_matrices=False)
    got = product(pj.corda(rank=2, moments=even))
    np.testing.assert_allclose(got, (u[:, :2] * sizes[:2]) @ vt[:2], atol=1e-5)


def test_it_starts_as_the_base_which_may_be_of_codes(moments):
    rows = {"up": {"kernel": normal(KEY, (64, 8))}}
    method = pj.chain(pj.nf4(), pj.corda(rank=2, moments={PATH: jnp.eye(64)}))
    frozen, fresh = method.init(KEY, rows)
    coded = pj.nf4().merge(*pj.nf4().init(KEY, rows))
    np.testing.assert_allclose(method.merge(frozen, fresh)["up"]["kernel"], coded["up"]["kernel"], atol=1e-6)
    assert np.abs(method.merge(frozen, noisy(fresh))["up"]["kernel"] - coded["up"]["kernel"]).max() > 0.1


def test_what_does_not_fit_says_so(moments):
    with pytest.raises(pj.PeftError, match=r"corda: moments, from peftjax.calibrate.input_statistics, are"):
        pj.corda(rank=2)
    with pytest.raises(pj.PeftError, match=r"corda: moments, from"):
        pj.corda(rank=2, moments=moments, loaded=True)
    with pytest.raises(pj.PeftError, match=r"moments has no array of shape \(6, 6\) for 'up/kernel'"):
        pj.corda(rank=2, moments={PATH: jnp.eye(8)}).init(KEY, PARAMS)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_factors_are_those_of_peft(mode):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    corda = pytest.importorskip("peft.tuners.lora.corda", reason="peft has no CorDA")
    config_module = pytest.importorskip("peft.tuners.lora.config", reason="peft has no CorDA")
    model = torch.nn.Sequential()
    model.add_module("up", torch.nn.Linear(6, 8, bias=False))
    with torch.no_grad():
        model.up.weight.copy_(torch.tensor(np.asarray(PARAMS["up"]["kernel"]).T))
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["up"], init_lora_weights="corda",
        corda_config=config_module.CordaConfig(corda_method=mode),
    )  # fmt: skip
    x = torch.tensor(np.asarray(X))
    corda.preprocess_corda(model, config, lambda: model(x))
    layer = peft.get_peft_model(model, config).base_model.model.up
    theirs = [
        layer.lora_A["default"].weight.detach().numpy(),
        layer.lora_B["default"].weight.detach().numpy().T,
    ]
    # Its covariance is of inputs divided by their largest number, and a sum over the tokens of a sample.
    c = np.asarray(X.T @ X) / float(X.max()) ** 2
    own = pj.corda(rank=2, alpha=6.0, moments={PATH: jnp.asarray(c)}, keep=mode == "kpm").init(KEY, PARAMS)[
        1
    ][PATH]
    signs = np.sign(np.sum(np.asarray(own["b"]) * theirs[1], axis=1, keepdims=True))
    np.testing.assert_allclose(own["a"] * signs, theirs[0], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(own["b"] * signs, theirs[1], rtol=1e-2, atol=1e-3)
