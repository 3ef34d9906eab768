"""LoRA-GA: the first step against the best approximation of the gradient, and the factors against PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter

PARAMS = {"up": {"kernel": normal(KEY, (12, 8)) / 3}}
X, Y = normal(jax.random.key(1), (20, 12)), normal(jax.random.key(2), (20, 8))
PATH = "up/kernel"


def loss(params, batch):
    return jnp.mean((batch[0] @ params["up"]["kernel"] - batch[1]) ** 2)


@pytest.fixture(scope="module")
def gradients():
    return pj.calibrate.mean_gradient(loss, PARAMS, [(X, Y)])


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_first_step_is_the_best_approximation_of_the_gradient(direction, gradients):
    method = pj.lora_ga(rank=3, alpha=6.0, gamma=9.0, gradients=gradients, direction=direction)
    frozen, fresh = method.init(KEY, PARAMS)
    own, scale = fresh[PATH], 6.0 / np.sqrt(3)
    for factor in own.values():  # orthogonal rows of length out^¼ / √gamma
        np.testing.assert_allclose(factor @ factor.T, np.eye(3) * np.sqrt(8) / 9, atol=1e-5)
    grads = jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t), (X, Y)))(fresh)[PATH]
    change = scale * (grads["a"].T @ own["b"] + own["a"].T @ grads["b"])
    u, sizes, vt = np.linalg.svd(np.asarray(gradients[PATH]))
    rank = 6 if direction != "random" else None
    if rank:
        best = (u[:, :6] * sizes[:6]) @ vt[:6]
        np.testing.assert_allclose(change, scale**2 * np.sqrt(8) / 9 * best, rtol=1e-3, atol=1e-5)
    else:
        of_a = np.linalg.norm(np.asarray(own["a"]) @ u[:, :6], axis=1)
        np.testing.assert_allclose(of_a, np.linalg.norm(own["a"], axis=1), rtol=1e-5)


def test_the_base_stays_and_a_stack_has_gradients_of_its_own(gradients):
    stacked = {"up": {"kernel": jnp.stack([PARAMS["up"]["kernel"]] * 3)}}
    given = {PATH: jnp.stack([gradients[PATH], 2.0 * gradients[PATH][::-1], jnp.zeros((12, 8))])}
    method = pj.lora_ga(rank=2, gradients=given, layers=[0, 1])
    frozen, fresh = method.init(KEY, stacked)
    assert frozen.params["up"]["kernel"] is stacked["up"]["kernel"]
    alone = pj.lora_ga(rank=2, gradients=gradients).init(KEY, PARAMS)[1]
    np.testing.assert_allclose(np.abs(fresh[PATH]["b"][0]), np.abs(alone[PATH]["b"]), atol=1e-5)
    np.testing.assert_allclose(np.abs(fresh[PATH]["a"][1]), np.abs(alone[PATH]["a"][:, ::-1]), atol=1e-5)
    merged = method.merge(frozen, noisy(fresh))["up"]["kernel"]
    changed = np.abs(merged - stacked["up"]["kernel"]).max((1, 2))
    assert (changed[:2] > 0.01).all()
    assert changed[2] == 0.0
    np.testing.assert_allclose(
        method.merge(frozen, fresh)["up"]["kernel"], stacked["up"]["kernel"], atol=1e-6
    )


def test_a_saved_adapter_has_its_start_in_its_file(gradients, tmp_path):
    method = pj.lora_ga(rank=2, gradients=gradients)
    frozen, fresh = method.init(KEY, PARAMS)
    save_adapter(tmp_path, method, frozen, noisy(fresh), seed=0)
    loaded = load_adapter(tmp_path, PARAMS)
    assert loaded.method.config["loaded"]
    wanted, got = (
        m.merge(f, t)["up"]["kernel"]
        for m, f, t in (
            (method, frozen, noisy(fresh)),
            (loaded.method, loaded.frozen, loaded.trainable),
        )
    )
    np.testing.assert_array_equal(got, wanted)


def test_what_does_not_fit_says_so(gradients):
    with pytest.raises(pj.PeftError, match=r"lora_ga: gradients, from peftjax.calibrate.mean_gradient, are"):
        pj.lora_ga(rank=2)
    with pytest.raises(pj.PeftError, match=r"rank 5 takes 2·5 directions of 'up/kernel', a matrix of 12 x 8"):
        pj.lora_ga(rank=5, gradients=gradients).init(KEY, PARAMS)
    with pytest.raises(pj.PeftError, match=r"gradients has no array of shape \(12, 8\) for 'up/kernel'"):
        pj.lora_ga(rank=2, gradients={}).init(KEY, PARAMS)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_the_directions_are_those_of_peft(direction, gradients):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = torch.nn.Sequential()
    model.add_module("up", torch.nn.Linear(12, 8, bias=False))
    with torch.no_grad():
        model.up.weight.copy_(torch.tensor(np.asarray(PARAMS["up"]["kernel"]).T))
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["up"], init_lora_weights="lora_ga", use_rslora=True,
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale="unit"),
    )  # fmt: skip
    x, y = (torch.tensor(np.asarray(v)) for v in (X, Y))
    peft.preprocess_loraga(model, config, lambda: torch.mean((model(x) - y) ** 2).backward())
    layer = peft.get_peft_model(model, config).base_model.model.up
    method = pj.lora_ga(rank=3, alpha=6.0, gamma=np.sqrt(8), gradients=gradients, direction=direction)
    own = method.init(KEY, PARAMS)[1][PATH]
    theirs = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b = (np.abs(w.detach().numpy()) for w in theirs)
    np.testing.assert_allclose(np.abs(own["a"]), a, atol=1e-4)
    # Theirs is multiplied by the singular values besides, which the authors' code does not do.
    sizes = np.linalg.svd(np.asarray(gradients[PATH]))[1]
    taken = {"ArB2r": sizes[3:6], "A2rBr": sizes[:3], "ArBr": sizes[0:6:2]}[direction]
    np.testing.assert_allclose(np.abs(own["b"]) * taken[:, None], b.T, atol=1e-4)
    base = (
        layer.base_layer.weight.detach().numpy()
        + layer.scaling["default"] * (theirs[1] @ theirs[0]).detach().numpy()
    )
    np.testing.assert_allclose(base.T, PARAMS["up"]["kernel"], atol=1e-6)
