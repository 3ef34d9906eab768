"""LST: the outputs of the ladder, its gates, what stays as it was, and its composition."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_t5
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ladders import adapted, backbone, climbed, halved, up
from support import KEY, all_but_slow, assert_close, quick_at
from tiny_models import moved

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.backbone.rope import rotation
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.models.t5 import t5
from peftjax.models.t5_config import read_config
from peftjax.train.step import model_loss

CASES = {
    "bert": {},
    "vit": {"side_layers": [0, 2]},
    "llama": {"side_layers": [1]},
    "gemma": {"side_layers": [0, 2], "gate": "sum"},
    "fused": {"init": "random", "merge_last": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(CASES, ("bert", "llama")))
def test_the_ladder_is_the_loop_over_its_layers(name):
    tiny, options = backbone(name), CASES[name]
    model, params, trainable = adapted(name, **options)
    side, used = trainable["blocks"], options.get("side_layers", [0, 1, 2])

    @jax.jit
    def both(params, side, batch):
        hidden, context = tiny.forward.run_embed(tiny.params, batch)
        gate = options.get("gate") != "sum"
        last, stream = climbed(tiny.forward, tiny.params, side, hidden, context, halved(context), used, gate)
        end = up(side, stream)
        if options.get("merge_last"):
            share = jax.nn.sigmoid(side["merge"] / 0.1)
            end = share * end + (1 - share) * last
        return model(params, batch), tiny.forward.run_head(tiny.params, end, context)

    assert_close(*both(params, side, tiny.batch))


@pytest.mark.slow
def test_the_ladders_of_an_encoder_decoder_are_the_loops_over_their_layers():
    """The side decoder attends to the side encoder, each with its own table of positions."""
    tiny = backbone("t5")
    model, params, trainable = adapted("t5", side_layers=[1])
    encoder, embed = tiny.forward.encoder, tiny.params["embed"]
    stacks = {"encoder_positions": "encoder", "decoder_positions": "blocks"}
    tables = {name: trainable[stack]["positions"] for name, stack in stacks.items()}
    own = {**tiny.params, "embed": {**embed, **tables}}
    bias = lambda inputs: {"bias": inputs[1].bias}

    @jax.jit
    def wanted(batch):
        first, second, own_first, own_second = (
            stack.run_embed({**part[name], "embed": part["embed"]} if name else part, batch)
            for part in (tiny.params, own)
            for stack, name in ((encoder, "encoder"), (tiny.forward, ""))
        )
        parts = encoder, tiny.params["encoder"], trainable["encoder"]
        _, of_side = climbed(*parts, *first, bias(own_first), [1])
        parts = tiny.forward, tiny.params, trainable["blocks"]
        _, stream = climbed(*parts, *second, {**bias(own_second), "encoded": of_side}, [1])
        return tiny.forward.run_head(tiny.params, up(trainable["blocks"], stream), second[1]).dense()

    assert_close(jax.jit(model)(params, tiny.batch).dense(), wanted(tiny.batch))


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}])
def test_every_second_angle_is_the_rotation_of_a_head_half_as_wide(rope):
    positions, rope = jnp.arange(9)[None], {"rope_theta": 1e4, **rope}
    wide, narrow = (rotation(positions, size, rope, 16) for size in (16, 8))
    assert_close(jax.tree.map(lambda angles: angles[..., ::2], wide), narrow)


def test_a_fresh_gate_is_one_half():
    _, trainable = jax.jit(pj.lst(reduction=2).init)(KEY, backbone("bert").params)
    np.testing.assert_array_equal(jax.nn.sigmoid(trainable["blocks"]["gate"] / 0.1), 0.5)


@pytest.mark.slow
def test_an_open_gate_is_independent_of_the_backbone_and_a_shut_one_of_the_stream():
    tiny = backbone("bert")
    model, params, _ = adapted("bert")
    other = jax.tree.map(lambda leaf: leaf.at[1:].add(0.1), tiny.params["blocks"])

    run = jax.jit(model)

    def out(gate, blocks=params["blocks"], **changes):
        side = {**params["lst"], "gate": jnp.array(gate), **changes}
        return run({**params, "lst": side, "blocks": blocks}, tiny.batch)

    np.testing.assert_array_equal(out([0.0, 99.0, 99.0]), out([0.0, 99.0, 99.0], blocks=other))
    first = jax.tree.map(lambda leaf: leaf + 1, params["lst"]["first"])
    np.testing.assert_array_equal(out([0.0, 0.0, -99.0]), out([0.0, 0.0, -99.0], first=first))
    assert float(jnp.abs(out([0.0, 99.0, 0.0]) - out([0.0, 99.0, 0.0], blocks=other)).max()) > 1e-3


@pytest.mark.slow
def test_dropout_of_both_networks_or_of_the_side_alone():
    tiny = backbone("t5")

    def encoded(key, **options):
        model, params, _ = adapted("t5", **options)
        encoder, params = model.encoder, {**params["encoder"], "embed": params["embed"]}
        return jax.jit(lambda params: encoder(params, tiny.batch, key=key))(params)

    still, both, one = encoded(None), encoded(KEY), encoded(KEY, backbone_dropout=False)
    unchanged = lambda name, dropped: np.array_equal(getattr(still, name), getattr(dropped, name))
    assert [unchanged("backbone", both), unchanged("side", both)] == [False, False]
    assert [unchanged("backbone", one), unchanged("side", one)] == [True, False]


NAMES = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")


@pytest.mark.parametrize(
    ("sizes", "used", "count", "percent"),
    [
        ((768, 64, 3072, 12, 12, 12), [1, 2, 3, 5, 6, 7, 9, 10, 11], 3_878_706, 1.74),
        ((1024, 64, 4096, 16, 24, 24), [*range(1, 24, 2)], 9_057_304, 1.23),
        ((1024, 128, 16384, 32, 24, 24), [23], 2_494_850, 0.09),
    ],
    ids=["base", "large", "3b"],
)
def test_the_numbers_of_parameters_that_the_paper_has_for_t5(sizes, used, count, percent):
    sizes = {**dict(zip(NAMES, sizes)), "vocab_size": 32128}
    buckets = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    model = t5(read_config(tiny_t5.values(**sizes, **buckets)))
    shapes = jax.eval_shape(model.init, KEY)
    _, trainable = jax.eval_shape(pj.lst(side_layers=used).init, KEY, shapes)
    assert tree.count(trainable) == count
    assert round(100 * count / tree.count(shapes), 2) == percent


@pytest.mark.slow
def test_a_method_of_the_side_network_trains_that_alone():
    tiny = backbone("llama")
    inner = pj.chain(pj.lora(rank=2, targets=".*layers.*kernel"), pj.unfreeze(["blocks/gate"]))
    method = pj.lst(reduction=2, side=inner)
    frozen, trainable = jax.jit(method.init)(KEY, tiny.params)
    assert {path.split("/")[0] for path in tree.named_leaves(trainable)} == {"lora", "unfreeze"}
    run = pj.adapt(method.model(tiny.forward))
    plain = pj.lst(reduction=2)
    _, whole = jax.jit(plain.init)(KEY, tiny.params)
    out = jax.jit(lambda trainable: run(method.apply(frozen, trainable), tiny.batch))
    grads = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(out(t)))))(moved(trainable))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    # LoRA starts as the network it changes.
    assert_close(out(trainable), plain.model(tiny.forward)(plain.apply(frozen, whole), tiny.batch))


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner", [None, pj.chain(pj.lora(rank=2), pj.unfreeze(["blocks/gate"]))], ids=["all", "some"]
)
def test_a_saved_network_comes_back_without_its_scores(tmp_path, inner):
    tiny = backbone("bert")
    scores = {path: jnp.square(leaf) + 1 for path, leaf in tree.named_leaves(tiny.params).items()}
    method = pj.lst(reduction=2, init="fisher", scores=scores, side=inner)
    frozen, trainable = method.init(jax.random.key(3), tiny.params)
    trainable = moved(trainable)
    save_adapter(tmp_path, method, frozen, trainable, seed=3)
    again = load_adapter(tmp_path, tiny.params)
    assert json.loads(json.dumps(pj.describe(again.method))) == pj.describe(method)
    before, after = (
        jax.jit(pj.adapt(m.model(tiny.forward)))(m.apply(f, t), tiny.batch)
        for m, f, t in ((method, frozen, trainable), (again.method, again.frozen, again.trainable))
    )
    np.testing.assert_array_equal(before, after)


@pytest.mark.slow
def test_it_trains_and_the_backbone_stays():
    tiny = backbone("bert dropout")
    method = pj.lst(reduction=2)
    frozen, trainable = jax.jit(method.init)(KEY, tiny.params)
    before = jax.tree.map(np.array, frozen)
    tx = optax.adam(1e-2)

    def objective(outputs, batch):
        loss = jnp.mean(jnp.square(outputs - 1.0))
        return {"loss": loss}, jnp.ones(())

    training = pj.training(method, model_loss(method.model(tiny.forward), objective, model_dropout=True), tx)
    state, losses = training.begin(frozen, trainable, KEY), []
    for _ in range(20):
        state, metrics = training.step(state, tiny.batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


@pytest.mark.slow
def test_on_eight_devices_it_is_what_it_is_on_one():
    tiny, method = backbone("llama"), pj.lst(reduction=2, side_layers=[0, 2])
    model, mesh = method.model(tiny.forward), jax.make_mesh((2, 4), ("data", "fsdp"), (AxisType.Auto,) * 2)
    batch = {"input_ids": jnp.tile(tiny.batch["input_ids"], (2, 1))}

    def spread(leaf):
        axes = [None] * leaf.ndim
        if leaf.ndim > 1 and leaf.shape[-1] % 4 == 0:
            axes[-1] = "fsdp"
        return jax.device_put(leaf, NamedSharding(mesh, P(*axes)))

    @jax.jit
    def step(trainable, frozen, batch):
        loss = lambda trainable: jnp.sum(jnp.sin(pj.adapt(model)(method.apply(frozen, trainable), batch)))
        return jax.value_and_grad(loss)(trainable)

    frozen, trainable = jax.jit(method.init)(KEY, tiny.params)
    wanted = step(trainable, frozen, batch)
    rows = jax.device_put(batch, NamedSharding(mesh, P("data")))
    assert_close(step(*jax.tree.map(spread, (trainable, frozen)), rows), wanted, 1e-4)


# Refused.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reduction": 0}, "reduction must be positive, got 0"),
        ({"side_layers": []}, "side_layers names no layer"),
        ({"gate": "open"}, "gate must be one of learned, sum, got 'open'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"init": "zeros"}, "init must be one of fisher"),
        ({"init": "fisher"}, "init 'fisher' and scores do not go together"),
        ({"scores": {}}, "init 'magnitude' and scores do not go together"),
    ],
)
def test_settings_out_of_range(options, text):
    with pytest.raises(PeftError, match=text):
        pj.lst(**options)


@pytest.mark.slow
def test_layers_scores_and_widths_that_do_not_fit():
    tiny = backbone("llama")
    with pytest.raises(PeftError, match=r"side_layers names layer 3 of a stack of 3 layers"):
        pj.lst(side_layers=[1, 3]).init(KEY, tiny.params)
    with pytest.raises(
        PeftError, match=r"scores has no array of shape \(3, 16, 8\) for 'blocks/attention/key/kernel'"
    ):
        pj.lst(init="fisher", scores={}).init(KEY, tiny.params)
    with pytest.raises(PeftError, match=r"reduction 4 does not divide half of the heads' width.* 2;"):
        pj.lst(reduction=4).model(tiny.forward)


OTHERS = {
    "lora": pj.lora(rank=2, targets=["query"]),
    "rows": pj.rows([1]),
    "unfreeze": pj.unfreeze(["blocks/attention_norm/scale"]),
    "bitfit": pj.bitfit(),
}


@pytest.mark.slow
def test_what_the_method_of_the_side_network_does_around_the_optimizer_is_done():
    method = pj.lst(reduction=2, side=pj.lora_plus(rank=2, targets=".*layers.*kernel", ratio=4.0))
    frozen, trainable = jax.jit(method.init)(KEY, backbone("llama").params)
    tx = method.optimizer(optax.sgd(1.0))
    ones = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = tx.update(ones, tx.init(trainable), trainable, frozen=frozen)
    for slots in updates.values():
        assert float(slots["a"].max()) == -1.0
        assert float(slots["b"].max()) == -4.0


@pytest.mark.parametrize(
    "side", [pj.galore(rank=2), pj.switchlora(total_steps=9), pj.shira(in_place=True)], ids=lambda m: m.name
)
def test_a_method_that_changes_itself_or_its_base_is_refused_for_the_side_network(side):
    with pytest.raises(PeftError, match=f"lst: side='{side.name}' changes itself or its base between steps"):
        pj.lst(side=side)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_what_would_train_nothing_in_the_backbone_is_refused(other, first):
    both = [OTHERS[other], pj.lst(reduction=2)]
    method = pj.chain(pj.chain(*(both if first else both[::-1])))
    with pytest.raises(PeftError, match=rf"lst: '.*' is (trained by '{other}'|a .*),.* lst\(side="):
        jax.eval_shape(method.init, KEY, backbone("bert").params)


def test_the_head_may_be_trained():
    method = pj.chain(pj.lst(reduction=2), pj.unfreeze(["head/norm"]))
    _, trainable = jax.eval_shape(method.init, KEY, backbone("llama").params)
    assert trainable["unfreeze"].keys() == {"head/norm/scale"}


@pytest.mark.parametrize("first", quick_at([True, False], 1))
def test_another_method_of_the_blocks_is_refused(first):
    tiny, both = backbone("llama"), [pj.lst(reduction=2), pj.pfeiffer(size=2)]
    method = pj.chain(*(both if first else both[::-1]))
    params = method.apply(*jax.jit(method.init)(KEY, tiny.params))
    with pytest.raises(PeftError, match=r"chain: 'pfeiffer' changes the blocks .*'lst'"):
        method.model(tiny.forward)(params, tiny.batch)
    with pytest.raises(PeftError, match=r"chain: 'lst' and 'lst' both run the blocks"):
        pj.chain(both[0], both[0]).model(tiny.forward)
