"""EVA: directions and ranks against NumPy's and PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.methods.lowrank.eva import shared_ranks

WIDTHS = {"one": 6, "two": 10}
PARAMS = {name: {"kernel": normal(KEY, (n, 12))} for name, n in WIDTHS.items()}
# The inputs of 'one' have few directions, those of 'two' many.
SPREAD = {"one": np.array([9.0, 4.0, 0.1, 0.1, 0.1, 0.1]), "two": np.linspace(2.0, 1.0, 10)}
X = {
    name: normal(jax.random.key(n), (400, n))
    * SPREAD[name]
    @ np.linalg.qr(np.asarray(normal(jax.random.key(n + 1), (n, n))))[0]
    + 1.0
    for name, n in WIDTHS.items()
}


def forward(params, batch):
    return {name: batch[name] @ params[name]["kernel"] for name in WIDTHS}


@pytest.fixture(scope="module")
def covariances():
    return pj.calibrate.input_statistics(forward, PARAMS, [X]).covariances


def test_a_is_the_principal_directions_and_ranks_follow_the_variance(covariances):
    method = pj.eva(rank=3, alpha=6.0, covariances=covariances)
    frozen, fresh = method.init(KEY, PARAMS)
    shares, wanted = [], {}
    for name in WIDTHS:
        values, vectors = np.linalg.eigh(np.cov(np.asarray(X[name]).T))
        shares += [(value / values.sum(), name) for value in values[::-1][:6]]
        wanted[name] = vectors[:, ::-1].T
    taken = [name for _, name in sorted(shares, reverse=True)[:6]]
    assert {name: taken.count(name) for name in WIDTHS} == {"one": 2, "two": 4}
    for name, rank in (("one", 2), ("two", 4)):
        own = fresh[f"{name}/kernel"]
        assert own["a"].shape == (rank, WIDTHS[name])
        assert not own["b"].any()
        np.testing.assert_allclose(np.abs(own["a"]), np.abs(wanted[name][:rank]), atol=1e-2)
    assert {target.scale for target in frozen.plan} == {2.0}  # alpha / rank, whatever the rank of each


def test_with_rho_1_all_ranks_are_alike_and_one_that_is_left_out_is_not_adapted(covariances):
    fresh = pj.eva(rank=3, covariances=covariances, rho=1.0).init(KEY, PARAMS)[1]
    assert {own["a"].shape[0] for own in fresh.values()} == {3}
    given = {"one/kernel": jnp.diag(jnp.array([1.0, 0, 0, 0, 0, 0])), "two/kernel": jnp.eye(10)}
    fresh = pj.eva(rank=1, covariances={**given, "one/kernel": jnp.diag(jnp.arange(6.0))}).init(KEY, PARAMS)[
        1
    ]
    assert set(fresh) == {"one/kernel"}
    ranks = shared_ranks({"s": jnp.stack([jnp.diag(jnp.array([8.0, 1, 1, 0])), jnp.eye(4)])}, {"s": 2}, 2.0)
    assert ranks["s"].tolist() == [1, 3]


def test_layers_of_a_stack_have_ranks_of_their_own_and_the_rest_stays_zero():
    params = {"up": {"kernel": normal(KEY, (2, 4, 5))}}
    given = {"up/kernel": jnp.stack([jnp.diag(jnp.array([8.0, 1, 1, 0])), jnp.eye(4)])}
    method = pj.eva(rank=2, covariances=given)
    frozen, fresh = method.init(KEY, params)
    a = np.asarray(fresh["up/kernel"]["a"])
    assert np.abs(a).sum(-1).astype(bool).tolist() == [[True, False, False], [True, True, True]]
    x = normal(jax.random.key(5), (2, 7, 4))

    def loss(t):
        out = pj.adapt(lambda p, x: jnp.einsum("lbi,lio->lbo", x, p["up"]["kernel"]))(
            method.apply(frozen, t), x
        )
        return jnp.sum(jnp.sin(out))

    grads = jax.grad(loss)(fresh)["up/kernel"]
    assert np.abs(grads["b"]).sum(-1).astype(bool).tolist() == [[True, False, False], [True, True, True]]


def test_a_saved_adapter_has_its_ranks_in_its_file(covariances, tmp_path):
    method = pj.eva(rank=3, covariances=covariances, alpha_pattern={"two": 9.0})
    frozen, fresh = method.init(KEY, PARAMS)
    save_adapter(tmp_path, method, frozen, noisy(fresh), seed=0)
    loaded = load_adapter(tmp_path, PARAMS)
    assert loaded.frozen.plan == frozen.plan
    got, wanted = loaded.method.merge(loaded.frozen, loaded.trainable), method.merge(frozen, noisy(fresh))
    for name in WIDTHS:
        np.testing.assert_array_equal(got[name]["kernel"], wanted[name]["kernel"])


def test_what_does_not_fit_says_so(covariances):
    with pytest.raises(pj.PeftError, match=r"eva: covariances, from peftjax.calibrate.input_statistics, are"):
        pj.eva(rank=2)
    with pytest.raises(pj.PeftError, match="eva: the targets are those of the covariances"):
        pj.eva(rank=2, covariances=covariances, targets=["one"])
    with pytest.raises(pj.PeftError, match=r"eva: rho must be 1.0 or more, got 0.5"):
        pj.eva(rank=2, covariances=covariances, rho=0.5)
    with pytest.raises(pj.PeftError, match=r"covariances has no array of shape \(6, 6\) for 'one/kernel'"):
        pj.eva(rank=2, covariances={"one/kernel": jnp.eye(7)}).init(KEY, PARAMS)


@pytest.mark.slow
@pytest.mark.parity
def test_ranks_and_directions_are_those_of_peft(covariances):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (torch.nn.Linear(n, 12, bias=False) for n in WIDTHS.values())

        def forward(self, one, two):
            return self.one(one), self.two(two)

    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["one", "two"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    model = peft.get_peft_model(Layers(), config)
    batches = [{name: torch.tensor(np.asarray(x)) for name, x in X.items()}]
    peft.initialize_lora_eva_weights(
        model, batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    frozen, fresh = pj.eva(rank=3, alpha=6.0, covariances=covariances).init(KEY, PARAMS)
    for target in frozen.plan:
        layer = getattr(model.base_model.model, target.path.split("/")[0])
        theirs, own = layer.lora_A["default"].weight.detach().numpy(), np.asarray(fresh[target.path]["a"])
        assert theirs.shape == own.shape
        assert layer.scaling["default"] == target.scale
        # It adds up randomized decompositions of batches, so that close directions mix a little.
        np.testing.assert_allclose(np.abs(np.sum(theirs * own, axis=1)), 1.0, atol=2e-2)
