"""Experts that lie over axes of a mesh: the same losses as on one device, and no matrix of theirs moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import CONFIG, losses
from support import KEY, assert_close, noisy, normal
from test_collectives import LENGTH, ROWS, of_step

import peftjax as pj
from peftjax.backbone.block_config import BlockConfig, Experts
from peftjax.backbone.experts import RoutedFeedForward
from peftjax.core import tree
from peftjax.models.gpt_oss import GPT_OSS
from peftjax.models.mixtral import MIXTRAL
from peftjax.parallel import make_mesh, shardings

EXPERTS, INNER = 8, 56
SETTINGS = {
    **CONFIG, "model_type": "mixtral", "intermediate_size": INNER,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
}  # fmt: skip
MODEL = MIXTRAL.build(MIXTRAL.read_config(SETTINGS))
TARGETS = ".*(attention|experts).*"
METHODS = {
    "lora": lambda: pj.lora(rank=4, targets=TARGETS),
    "nf4": lambda: pj.chain(pj.nf4(group=16), pj.lora(rank=4, targets=TARGETS)),
    "dora": lambda: pj.dora(rank=4, targets=TARGETS),
    "full": pj.full,
}
LAYER = BlockConfig(
    width=16, num_heads=2, inner_size=24, norm_epsilon=1e-5, activation="silu",
    experts=Experts(count=4, chosen=3, router_bias=True), feed_forward_bias=True,
)  # fmt: skip


def whole(module, x):
    return module.down(module.activate(*module.expand(x)))


def test_whole_experts_lie_over_expert_and_tensor():
    mesh = make_mesh("fsdp=2,expert=2,tensor=2")
    found = shardings(MODEL.shapes, mesh)["blocks"]
    experts = found["feed_forward"]["experts"]
    assert experts["up"]["kernel"].spec == jax.P(None, ("expert", "tensor"), "fsdp", None)
    assert experts["down"]["kernel"].spec == jax.P(None, ("expert", "tensor"), None, "fsdp")
    assert found["attention"]["query"]["kernel"].spec == jax.P(None, ("fsdp", "expert"), "tensor")
    few = make_mesh("tensor=8")  # 8 devices do not divide 4 experts
    kernel = {"experts": {"up": {"kernel": jax.ShapeDtypeStruct((2, 4, 64, 48), jnp.float32)}}}
    found = shardings({"blocks": {"feed_forward": kernel}}, few)["blocks"]["feed_forward"]
    assert found["experts"]["up"]["kernel"].spec == jax.P(None, None, "fsdp", None)


@pytest.mark.parametrize(
    "sizes",
    ["expert=4,fsdp=2", *(pytest.param(s, marks=pytest.mark.slow) for s in ("tensor=4,data=2", "fsdp=8"))],
)
def test_a_layer_and_its_gradients(sizes):
    """Rows with no expert of a device, tokens with more experts than it has, and biases."""
    x = normal(KEY, (8, 6, 16))
    plain = RoutedFeedForward(LAYER, jnp.float32)
    params = noisy(plain.init(KEY, x, method=whole)["params"], scale=0.4)
    probe = normal(jax.random.key(1), x.shape)
    modules = plain, RoutedFeedForward(dataclasses.replace(LAYER, mesh=make_mesh(sizes)), jnp.float32)

    def both(params, x):
        def energy(module):
            return lambda params, x: jnp.sum(module.apply({"params": params}, x, method=whole) * probe)

        return [jax.value_and_grad(energy(module), (0, 1))(params, x) for module in modules]

    wanted, found = jax.jit(both)(params, x)
    assert_close(found, wanted, 1e-5)


OTHERS = {
    "reflected inputs": lambda targets: pj.hra(rank=2, targets=targets),
    "scaled": lambda targets: pj.ia3(targets=targets),
    "rows": lambda targets: pj.paca(rank=2, targets=targets),
    "sparse": lambda targets: pj.shira(rank=2, targets=targets),
    "kernelized": lambda targets: pj.snell(rank=2, targets=targets),
    "products": lambda targets: pj.lokr(rank=2, targets=targets),
    "codes": lambda targets: pj.chain(pj.nf4(group=8, targets=targets), pj.lora(rank=2, targets=targets)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_what_methods_add_to_experts_follows_them(name):
    x = normal(KEY, (8, 6, 16))
    plain = RoutedFeedForward(LAYER, jnp.float32)
    params = {"blocks": {"feed_forward": noisy(plain.init(KEY, x, method=whole)["params"], scale=0.4)}}
    method = OTHERS[name](".*experts/(up|down)/kernel")
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable)
    probe = normal(jax.random.key(1), x.shape)
    on_mesh = dataclasses.replace(LAYER, mesh=make_mesh("expert=4,fsdp=2"))
    modules = plain, RoutedFeedForward(on_mesh, jnp.float32)

    def energy(module):
        def run(params, x):
            return module.apply({"params": params["blocks"]["feed_forward"]}, x, method=whole)

        return lambda trainable, x: jnp.sum(pj.adapt(run)(method.apply(frozen, trainable), x) * probe)

    wanted, found = jax.jit(lambda *args: [jax.value_and_grad(energy(m), (0, 1))(*args) for m in modules])(
        trainable, x
    )
    assert_close(found, wanted, 1e-4)  # the energies are small sums of large numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_one_device(name):
    method, devices = METHODS[name](), jax.devices()
    wanted, _ = losses(method, steps=5, model=MODEL)
    meshes = [("expert=8", 8), ("expert=2,fsdp=4", 8), ("data=2,expert=2,tensor=2", 8)]
    meshes += [("expert=4", 4), ("expert=2", 2)]
    for sizes, count in meshes if name == "lora" else meshes[:3]:
        found, state = losses(method, sizes, devices[:count], steps=5, model=MODEL)
        np.testing.assert_allclose(found, wanted, rtol=2e-5 if name == "full" else 1e-5, err_msg=sizes)
    up = state.frozen.params["blocks"]["feed_forward"]["experts"]["up"]["kernel"]
    for leaf in jax.tree.leaves((up, state.trainable.get("blocks/feed_forward/experts/up/kernel"))):
        if isinstance(leaf, jax.Array):
            assert "expert" in jax.tree.leaves(tuple(leaf.sharding.spec)[1]), leaf.shape


@pytest.mark.slow
def test_gpt_oss_with_tokens_over_sequence_and_tiles():
    read = {**SETTINGS, "model_type": "gpt_oss", "head_dim": 8, "sliding_window": 8}
    model = GPT_OSS.build(GPT_OSS.read_config(read))
    wanted, _ = losses(METHODS["lora"](), steps=4, model=model)
    for sizes, options in (("expert=2,sequence=4", {}), ("expert=4,tensor=2", {"feed_forward_tile": 5})):
        found, _ = losses(METHODS["lora"](), sizes, steps=4, model=model, **options)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=sizes)


@pytest.mark.slow
def test_a_file_is_read_by_experts_and_tokens_are_generated(tmp_path):
    """Three rows, which no axis divides: all devices of `expert` have the same tokens."""
    params = MODEL.init(KEY)
    pj.save(tmp_path, MODEL, params)
    model, found = pj.load(tmp_path, mesh=make_mesh("expert=4,fsdp=2"))
    for (path, leaf), wanted in zip(tree.named_leaves(found).items(), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(leaf, wanted, err_msg=path)
    up = found["blocks"]["feed_forward"]["experts"]["up"]["kernel"]
    assert up.addressable_shards[0].data.shape == (2, EXPERTS // 4, CONFIG["hidden_size"] // 2, INNER)
    ids = jnp.arange(15).reshape(3, 5)
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    one, other = (pj.generate(m, p, batch, max_new_tokens=4) for m, p in ((MODEL, params), (model, found)))
    np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "over"), [("expert=8", 1), ("expert=4,fsdp=2", 2), ("fsdp=8", 8)])
def test_no_matrix_of_an_expert_passes_over_their_axis(sizes, over):
    """What is gathered of experts is what `fsdp` divides, of a device's own experts."""
    found, _ = of_step(METHODS["lora"](), sizes, model=MODEL)
    own = EXPERTS // make_mesh(sizes).shape["expert"]
    width = CONFIG["hidden_size"]
    moves = [
        (one, shape)
        for one in found
        if one.kind in ("all-gather", "all-to-all", "collective-permute")
        for shape in one.shapes
        if shape[-2:] in ((width, INNER), (INNER, width))
    ]
    assert bool(moves) == (over > 1)
    for one, shape in moves:
        assert one.group == over
        assert np.prod(shape) <= own * width * INNER
    # The stream of the devices that share experts: there and back, each forward and backward.
    tokens = ROWS * LENGTH // over
    layers, gathered, part = CONFIG["num_hidden_layers"], (tokens, width), (tokens * over // 8, width)
    there = sum(one.runs for one in found if one.kind == "all-gather" and one.shapes == (gathered,))
    back = sum(one.runs for one in found if one.kind == "reduce-scatter" and one.shapes == (part,))
    assert (there, back) == ((3 * layers, 2 * layers) if over < 8 else (0, 0))
    # Of the router's logits nothing moves.
    assert not [one for one in found if (ROWS, LENGTH, EXPERTS) in one.shapes]
