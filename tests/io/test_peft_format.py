"""The file format of PEFT, written out by hand, and what is refused; the real PEFT is in test_peft_parity."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import safe_open
from support import assert_close, noisy, quick_at

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors
from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.models.weight_map import TensorEntry, convolution, embedding, linear, norm

KEY = jax.random.key(0)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LAYERS, WIDTH, INNER, WORDS = 3, 8, 12, 20
# A model of the user's own: an embedding, stacked layers, a convolution, and two heads.
TABLE = [
    embedding("embed", "tokens"),
    *linear("blocks/up", "layers.{layer}.up"),
    *linear("blocks/down", "layers.{layer}.down"),
    *norm("blocks/norm", "layers.{layer}.norm"),
    *convolution("conv", "conv"),
    *linear("head", "head"),
    *linear("my_head", "my_head"),
]


def draw(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS = draw(
    {
        "embed": {"embedding": (WORDS, WIDTH)},
        "blocks": {
            "up": {"kernel": (LAYERS, WIDTH, INNER), "bias": (LAYERS, INNER)},
            "down": {"kernel": (LAYERS, INNER, WIDTH), "bias": (LAYERS, WIDTH)},
            "norm": {"scale": (LAYERS, WIDTH), "bias": (LAYERS, WIDTH)},
        },
        "conv": {"kernel": (3, 5, WIDTH, 6), "bias": (6,)},
        "head": {"kernel": (WIDTH, 2), "bias": (2,)},
        "my_head": {"kernel": (WIDTH, 2), "bias": (2,)},
    }
)


def make(method, params=PARAMS):
    frozen, initial = method.init(KEY, params)
    return frozen, noisy(initial), initial


def tensors_of(folder):
    return dict(read_tensors(find_tensors(folder / TENSORS)))


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def exported(folder, method, **options):
    frozen, trainable, initial = make(method)
    pj.export_peft(folder, TABLE, method, frozen, trainable, initial=initial, **options)
    return frozen, trainable


def write(folder, config, tensors):
    """A folder as PEFT writes it, of a dictionary without the prefix."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}))
    write_tensors(folder / TENSORS, {f"base_model.model.{name}": tensor for name, tensor in tensors.items()})
    return folder


def factors(module, rank, inputs, outputs, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank))
    return {
        f"{module}.lora_A.weight": a.astype(np.float32),
        f"{module}.lora_B.weight": b.astype(np.float32),
    }


SHAPES = {
    "linear": (
        pj.lora(rank=2, targets=["up"], layers=[0, 2]),
        {
            "layers.0.up.lora_A.weight": (2, WIDTH),
            "layers.0.up.lora_B.weight": (INNER, 2),
            "layers.2.up.lora_A.weight": (2, WIDTH),
            "layers.2.up.lora_B.weight": (INNER, 2),
        },
    ),
    "embedding": (
        pj.dora(rank=2, targets=["embed"]),
        {
            "tokens.lora_embedding_A": (2, WORDS),
            "tokens.lora_embedding_B": (WIDTH, 2),
            "tokens.lora_magnitude_vector": (WIDTH,),
        },
    ),
    "convolution": (
        pj.dora(rank=2, targets=["conv"]),
        {
            "conv.lora_A.weight": (2, WIDTH, 3, 5),
            "conv.lora_B.weight": (6, 2, 1, 1),
            "conv.lora_magnitude_vector": (1, 6, 1, 1),
        },
    ),
    "saved module": (
        pj.chain(pj.lora(rank=2, targets=["head"]), pj.unfreeze(["my_head/kernel"])),
        {
            "head.lora_A.weight": (2, WIDTH),
            "head.lora_B.weight": (2, 2),
            "my_head.weight": (2, WIDTH),
            "my_head.bias": (2,),
        },
    ),
    "biases": (
        pj.chain(pj.lora(rank=2, targets=["head"], bias="adapted"), pj.unfreeze(["norm"])),
        {
            "head.lora_A.weight": (2, WIDTH),
            "head.lora_B.weight": (2, 2),
            "head.base_layer.bias": (2,),
            **{f"layers.{n}.norm.{name}": (WIDTH,) for n in range(3) for name in ("weight", "bias")},
        },
    ),
    "twice the rank": (
        pj.pissa(rank=2, targets=["head"]),
        {"head.lora_A.weight": (4, WIDTH), "head.lora_B.weight": (2, 4)},
    ),
}


@pytest.mark.parametrize("case", quick_at(SHAPES, every=2))
def test_names_and_shapes(case, tmp_path):
    method, wanted = SHAPES[case]
    exported(tmp_path, method)
    found = {name: tensor.shape for name, tensor in tensors_of(tmp_path).items()}
    assert found == {f"base_model.model.{name}": shape for name, shape in wanted.items()}
    with safe_open(tmp_path / TENSORS, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_the_numbers_stand_where_peft_looks_for_them(tmp_path):
    frozen, trainable = exported(tmp_path, pj.lora(rank=2, alpha=6, targets=["up", "embed", "conv"]))
    merged = pj.lora(rank=2, alpha=6, targets=["up", "embed", "conv"]).merge(frozen, trainable)
    held = {name.removeprefix("base_model.model."): value for name, value in tensors_of(tmp_path).items()}
    delta = 3.0 * held["layers.1.up.lora_B.weight"] @ held["layers.1.up.lora_A.weight"]
    assert_close(merged["blocks"]["up"]["kernel"][1] - PARAMS["blocks"]["up"]["kernel"][1], delta.T)
    delta = 3.0 * (held["tokens.lora_embedding_B"] @ held["tokens.lora_embedding_A"]).T
    assert_close(merged["embed"]["embedding"] - PARAMS["embed"]["embedding"], delta)
    a, b = held["conv.lora_A.weight"], held["conv.lora_B.weight"]
    delta = 3.0 * np.einsum("rixy,or->xyio", a, b[..., 0, 0])
    assert_close(merged["conv"]["kernel"] - PARAMS["conv"]["kernel"], delta)


def test_the_configuration(tmp_path):
    method = pj.chain(
        pj.rslora(rank=2, alpha=5, targets=["up", "head"], rank_pattern={"head": 1}, dropout=0.1),
        pj.unfreeze(["my_head"]),
    )
    exported(tmp_path, method, base="someone/model")
    config = config_of(tmp_path)
    assert config["target_modules"] == ["head", "layers.0.up", "layers.1.up", "layers.2.up"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 5, {"^head": 1})
    assert config["modules_to_save"] == ["my_head"]
    assert config["inference_mode"] is config["use_rslora"] is True
    assert config["fan_in_fan_out"] is False
    assert (config["base_model_name_or_path"], config["lora_dropout"]) == ("someone/model", 0.1)
    assert (config["peft_type"], config["bias"]) == ("LORA", "none")
    # At their defaults, and unknown to old versions of PEFT.
    assert not {"use_dora", "alpha_pattern", "lora_bias", "peft_version"} & config.keys()


def test_a_saved_module_does_not_take_its_namesake(tmp_path):
    """PEFT's modules_to_save=['head'] wraps 'my_head' too: such a module goes by its tensors' names."""
    method = pj.chain(pj.lora(rank=2, targets=["my_head"]), pj.unfreeze(["head"]))
    frozen, trainable = exported(tmp_path, method)
    assert config_of(tmp_path)["modules_to_save"] is None
    assert "base_model.model.head.weight" in tensors_of(tmp_path)
    again = pj.import_peft(tmp_path, TABLE, PARAMS)
    assert_close(again[0].merge(*again[1:]), method.merge(frozen, trainable), 0)


def test_weights_that_hugging_face_keeps_as_we_do_have_their_inputs_first(tmp_path):
    """GPT-2's Conv1D: the same factors as a linear layer, and a flag."""
    table = [TensorEntry("head/kernel", "head.weight")]
    method = pj.lora(rank=2, targets=["head/kernel"])
    frozen, trainable, _ = make(method)
    pj.export_peft(tmp_path, table, method, frozen, trainable)
    assert config_of(tmp_path)["fan_in_fan_out"] is True
    assert tensors_of(tmp_path)["base_model.model.head.lora_A.weight"].shape == (2, WIDTH)
    assert_close(pj.import_peft(tmp_path, table, PARAMS)[2], trainable, 0)


METHODS = [
    pj.lora(rank=2, targets=["up", "down"]),
    pj.lora(rank=2, targets=["up", "embed"], layers=[1]),
    pj.rslora(rank=3, alpha=7, targets=["conv", "up"]),
    pj.dora(rank=2, targets=["up", "embed", "conv"], alpha_pattern={"up": 3}, rank_pattern={"embed": 1}),
    pj.dora(rank=2, targets=["down"], layers=[0, 2]),
    pj.lora(rank=2, targets=["up"], bias="all"),
    pj.lora(rank=2, targets=["up"], bias="adapted", dropout=0.2),
    pj.chain(pj.lora(rank=2, targets=["up"]), pj.unfreeze(["head", "norm"])),
    pj.chain(pj.dora(rank=2, targets=["up"]), pj.unfreeze(["my_head"])),
]


@pytest.mark.parametrize("method", quick_at(METHODS, every=3), ids=lambda m: m.name)
def test_round_trips_are_exact(method, tmp_path):
    frozen, trainable = exported(tmp_path / "first", method)
    again, frozen_again, trainable_again = pj.import_peft(tmp_path / "first", TABLE, PARAMS)
    assert again.name == method.name
    assert_close(trainable_again, trainable, 0)
    assert_close(again.merge(frozen_again, trainable_again), method.merge(frozen, trainable), 0)
    pj.export_peft(tmp_path / "second", TABLE, again, frozen_again, trainable_again)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    save_adapter(tmp_path / "ours", again, frozen_again, trainable_again, seed=0)
    assert_close(load_adapter(tmp_path / "ours", PARAMS).trainable, trainable, 0)


@pytest.mark.slow
def test_an_adapter_of_one_bit_is_written_as_the_model_sees_it(tmp_path):
    inner = pj.rslora(rank=2, targets=["up"], dropout=0.2)
    method = pj.quantized_adapter(inner)
    frozen, trainable, _ = make(method)
    pj.export_peft(tmp_path, TABLE, method, frozen, trainable)
    config = config_of(tmp_path)
    assert (config["use_rslora"], config["lora_dropout"]) == (True, 0.2)
    again = pj.import_peft(tmp_path, TABLE, PARAMS)
    assert_close(again[0].merge(*again[1:]), method.merge(frozen, trainable), 1e-6)
    residual = pj.quantized_adapter(pj.pissa(rank=2, targets=["up"]))
    frozen, trainable, _ = make(residual)
    with pytest.raises(PeftError, match="pissa trains on a residual of the base"):
        pj.export_peft(tmp_path, TABLE, residual, frozen, trainable)


def test_the_file_is_no_larger_than_what_is_trained(tmp_path):
    params = draw({"blocks": {"up": {"kernel": (4, 256, 256)}}})
    method = pj.lora(rank=16)
    frozen, trainable, _ = make(method, params)
    pj.export_peft(tmp_path, linear("blocks/up", "layers.{layer}.up")[:1], method, frozen, trainable)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 1.05 * tree.nbytes(trainable)


UNEVEN = {"r": 4, "lora_alpha": 8, "target_modules": r"layers\.[02]\.up", "rank_pattern": {"layers.0.up": 1}}


def uneven(folder):
    """Layer 0 at rank 1 and scale 8, layer 1 without an adapter, layer 2 at rank 4 and scale 2."""
    tensors = factors("layers.0.up", 1, WIDTH, INNER) | factors("layers.2.up", 4, WIDTH, INNER, seed=1)
    tensors |= factors("head", 4, WIDTH, 2, seed=2)
    config = {**UNEVEN, "target_modules": ["layers.0.up", "layers.2.up", "head"]}
    return write(folder, config, tensors), tensors


def test_layers_of_one_stack_may_differ(tmp_path):
    folder, tensors = uneven(tmp_path / "theirs")
    method, frozen, trainable = pj.import_peft(folder, TABLE, PARAMS)
    merged = method.merge(frozen, trainable)
    wanted = np.asarray(PARAMS["blocks"]["up"]["kernel"]).copy()
    for layer, scale in ((0, 8.0), (2, 2.0)):
        a, b = (tensors[f"layers.{layer}.up.lora_{factor}.weight"] for factor in "AB")
        wanted[layer] += scale * (b @ a).T
    assert_close(merged["blocks"]["up"]["kernel"], wanted)
    a, b = (tensors[f"head.lora_{factor}.weight"] for factor in "AB")
    assert_close(merged["head"]["kernel"], np.asarray(PARAMS["head"]["kernel"]) + 2.0 * (b @ a).T)

    pj.export_peft(tmp_path / "ours", TABLE, method, frozen, trainable)
    held = tensors_of(tmp_path / "ours")
    assert config_of(tmp_path / "ours")["rank_pattern"] == {r"^layers\.0\.up": 1, "^head": 2}
    for name in ("layers.0.up", "layers.2.up"):
        for factor in "AB":
            name_of = f"{name}.lora_{factor}.weight"
            np.testing.assert_array_equal(held[f"base_model.model.{name_of}"], tensors[name_of])
    assert not [name for name in held if "layers.1." in name]


def test_filled_up_ranks_stay_zero_in_training(tmp_path):
    method, frozen, trainable = pj.import_peft(uneven(tmp_path)[0], TABLE, PARAMS)
    tx = method.optimizer(optax.adamw(0.1))

    def loss(trainable):
        return jnp.sum(method.merge(frozen, trainable)["blocks"]["up"]["kernel"] ** 3)

    @jax.jit
    def step(trainable):
        updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
        return optax.apply_updates(trainable, updates)

    after = step(trainable)["blocks/up/kernel"]
    for factor in ("a", "b"):
        assert not np.asarray(after[factor][0, 1:]).any()
        assert not np.asarray(after[factor][1]).any()
        assert np.asarray(after[factor][2]).all()


def test_patterns_lists_and_layers_are_read_as_peft_reads_them(tmp_path):
    tensors = factors("layers.1.up", 2, WIDTH, INNER) | factors("layers.1.down", 2, INNER, WIDTH)
    for config in (
        {"target_modules": ["up", "down"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["layers.1.up", "layers.1.down"]},
        {"target_modules": r".*\.1\.(up|down)"},
        {"target_modules": r"layers.*(up|down)", "exclude_modules": ["0.up", "0.down", "2.up", "2.down"]},
        {"target_modules": "all-linear", "exclude_modules": ["0.up", "0.down", "2.up", "2.down"]},
    ):
        folder = write(tmp_path / "adapter", {"r": 2, "lora_alpha": 4, **config}, tensors)
        method, _, trainable = pj.import_peft(folder, TABLE, PARAMS)
        assert method.config["layers"] == [1]
        np.testing.assert_array_equal(
            trainable["blocks/down/kernel"]["a"][0], tensors["layers.1.down.lora_A.weight"]
        )
    config = {"target_modules": ["up", "down"], "layers_to_transform": [1, 2], "layers_pattern": "layers"}
    with pytest.raises(PeftError, match=r"asks for 'layers.2.(up|down)', whose factors are missing"):
        pj.import_peft(write(folder, {"r": 2, **config}, tensors), TABLE, PARAMS)


def test_shifted_biases_are_folded_into_the_biases(tmp_path):
    shift = np.arange(2, dtype=np.float32)
    tensors = factors("head", 2, WIDTH, 2) | {"head.lora_B.bias": shift}
    config = {"r": 2, "lora_alpha": 6, "lora_bias": True, "target_modules": ["head"]}
    folder = write(tmp_path, {**config, "exclude_modules": ["my_head"]}, tensors)
    method, frozen, trainable = pj.import_peft(folder, TABLE, PARAMS)
    merged = method.merge(frozen, trainable)
    assert_close(merged["head"]["bias"], PARAMS["head"]["bias"] + 3.0 * shift)
    table = [entry for entry in TABLE if entry.path != "head/bias"]
    with pytest.raises(PeftError, match="no bias of its own"):
        pj.import_peft(folder, table, PARAMS)


# A change of a good configuration or file, and what the error must say.
GOOD = {"r": 2, "lora_alpha": 4, "target_modules": ["head"], "exclude_modules": ["my_head"]}
BAD_CONFIGS = [
    ({"peft_type": "POLY"}, "peft_type 'POLY'"),
    ({"use_qalora": True}, "sets use_qalora"),
    ({"arrow_config": {"top_k": 2}}, "sets arrow_config: a router has nothing trained"),
    ({"kasa_config": {"beta": 1}}, "lora_diag' is missing"),
    ({"kasa_config": {"beta": -1}}, "'kasa_config.beta': Expected `float` >= 0.0"),
    ({"layer_replication": [[0, 2, 3]]}, "Expected `array` of length 2"),
    ({"layer_replication": [[0, 90]]}, "layer_replication: a range ends at 90"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices asks for rows that are not in the file"),
    ({"use_dorra": True}, "closest: 'use_dora'"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "loftq"}, "residual of the base"),
    ({"bias": "some"}, "adapter_config.json: 'bias': Invalid enum value 'some'"),
    ({"r": "two"}, r"'r': Expected `int`, got `str` \('two'\)"),
    ({"r": 0}, "'r': Expected `int` >= 1"),
    ({"r": 2.5}, "'r': Expected `int`, got `float`"),
    ({"r": True}, "'r': Expected `int`, got `bool`"),
    ({"lora_alpha": math.nan}, "'lora_alpha': Expected `float`"),
    ({"lora_alpha": 10**400}, "adapter_config.json"),
    ({"lora_dropout": 1}, "'lora_dropout': Expected `float` < 1.0"),
    ({"use_rslora": "yes"}, "'use_rslora': Expected `bool`"),
    ({"rank_pattern": {"head": "2"}}, "rank_pattern.*Expected `int`, got `str`"),
    ({"rank_pattern": {"(": 3}}, r"'\(' is no regular expression"),
    ({"rank_pattern": [["head", 2]]}, "'rank_pattern': Expected `object`"),
    ({"target_modules": 3}, "'target_modules': Expected"),
    ({"target_modules": "(head"}, r"'\(head' is no regular expression"),
    ({"target_modules": ["head", 1]}, r"'target_modules\[1\]': Expected `str`"),
    ({"exclude_modules": "*"}, r"'\*' is no regular expression"),
    ({"modules_to_save": ["[a"]}, r"'\[a' is no regular expression"),
    ({"modules_to_save": {"a": 1}}, "'modules_to_save': Expected"),
    ({"layers_to_transform": -1}, "'layers_to_transform': Expected"),
    ({"task_type": ["CAUSAL_LM"]}, "'task_type': Expected"),
    ({"init_lora_weights": [1]}, "init_lora_weights"),
    ({"peft_type": []}, "peft_type"),
    ({"r": 3}, r"shape \[2, 8\]; rank 3 .* needs \[3, 8\]"),
    ({"use_dora": True}, "lora_magnitude_vector' is missing"),
    ({"target_modules": ["head", "down"]}, "asks for 'layers.0.down'"),
    ({"modules_to_save": ["my_head"]}, "'my_head.(bias|weight)' is missing"),
    ({"bias": "lora_only"}, "'head.bias' is missing"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=lambda value: str(value)[:30])
def test_bad_configurations_are_named(change, message, tmp_path):
    write(tmp_path, {**GOOD, **change}, factors("head", 2, WIDTH, 2))
    with pytest.raises(PeftError, match=message):
        pj.import_peft(tmp_path, TABLE, PARAMS)


BAD_TENSORS = [
    (lambda held: held.pop("head.lora_B.weight"), "head.lora_B.weight' is missing"),
    (lambda held: held.update(factors("heed", 2, 8, 2)), r"'heed.weight' has no place.*'head.weight'"),
    (lambda held: held.update({"heed.bias": np.zeros(2)}), "'heed.bias' has no place"),
    (lambda held: held.update({"my_head.bias": np.zeros(3, np.float32)}), r"my_head.bias' has shape \[3\]"),
    (lambda held: held.update({"head.lora_diag": np.zeros(2)}), "lora_diag' belongs to a variant"),
    (lambda held: held.update({"head.lora_magnitude_vector": np.zeros(2)}), "without use_dora"),
    (lambda held: held.update({"head.base_layer.weight": np.zeros((2, 8))}), "its own weight for"),
    (lambda held: held.update({"head.lora_embedding_A": np.zeros((2, 8))}), "does not go with the linear"),
    (lambda held: held.clear(), "holds no tensors of adapted modules"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS, ids=[message for _, message in BAD_TENSORS])
def test_bad_tensors_are_named(change, message, tmp_path):
    held = factors("head", 2, WIDTH, 2)
    change(held)
    with pytest.raises(PeftError, match=message):
        pj.import_peft(write(tmp_path, GOOD, held), TABLE, PARAMS)


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(PeftError, match="holds no PEFT adapter"):
        pj.import_peft(tmp_path, TABLE, PARAMS)
    write(tmp_path, GOOD, factors("head", 2, WIDTH, 2))
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[:-8])
    with pytest.raises(PeftError, match="not a complete safetensors file"):
        pj.import_peft(tmp_path, TABLE, PARAMS)
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(PeftError, match="save it again from PEFT as safetensors"):
        pj.import_peft(tmp_path, TABLE, PARAMS)
    write_tensors(tmp_path / TENSORS, {"prompt_embeddings": np.zeros((2, 2), np.float32)})
    with pytest.raises(PeftError, match="'prompt_embeddings' does not begin with"):
        pj.import_peft(tmp_path, TABLE, PARAMS)


def test_what_is_left_out_must_be_there(tmp_path):
    folder = write(tmp_path, GOOD, factors("head", 2, WIDTH, 2) | factors("pooler", 2, 3, 3))
    pj.import_peft(folder, TABLE, PARAMS, leave_out=["pooler"])
    with pytest.raises(PeftError, match="nothing of 'poler' to leave out; closest: 'pooler"):
        pj.import_peft(folder, TABLE, PARAMS, leave_out=["poler"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (pj.unfreeze(["head"]), "no weight has low-rank factors"),
        (pj.rows([1], targets=["embed"]), "no weight has low-rank factors"),
        (
            pj.chain(pj.lora(rank=2, targets=["up"]), pj.dora(rank=2, targets=["down"])),
            "use_dora is for all modules",
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_the_format_cannot_hold_is_refused(method, message, tmp_path):
    frozen, trainable, _ = make(method)
    with pytest.raises(PeftError, match=message):
        pj.export_peft(tmp_path, TABLE, method, frozen, trainable)
    assert not list(tmp_path.iterdir())


def test_a_residual_base_needs_the_start(tmp_path):
    method = pj.olora(rank=2, targets=["up"])
    frozen, trainable, _ = make(method)
    with pytest.raises(PeftError, match="pass initial="):
        pj.export_peft(tmp_path, TABLE, method, frozen, trainable)


def test_stacks_of_experts_have_no_form(tmp_path):
    params = draw({"experts": {"kernel": (2, 3, 4, 4)}})
    method = pj.lora(rank=2, targets=["experts"])
    frozen, trainable, _ = make(method, params)
    with pytest.raises(PeftError, match=r"stack axes \[2, 3\]"):
        pj.export_peft(tmp_path, linear("experts", "experts.{layer}")[:1], method, frozen, trainable)


def test_a_table_must_name_parameters_of_the_model(tmp_path):
    folder = write(tmp_path, GOOD, factors("head", 2, WIDTH, 2))
    with pytest.raises(PeftError, match=r"the table names 'heads/kernel'.*'head/kernel'"):
        pj.import_peft(folder, linear("heads", "head"), PARAMS)


def test_a_failed_write_leaves_the_old_adapter(tmp_path):
    method = pj.lora(rank=2, targets=["up"])
    frozen, trainable = exported(tmp_path, method)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    unwritable = jax.tree.map(lambda leaf: leaf.astype(jnp.float8_e4m3fn), trainable)
    with pytest.raises(PeftError, match="no float8_e4m3fn"):
        pj.export_peft(tmp_path, TABLE, method, frozen, unwritable)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def bert_model(head):
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    model = bert(config, head=head)
    shapes = jax.eval_shape(model.init, KEY)
    return model, draw(jax.tree.map(lambda leaf: leaf.shape, shapes))


@pytest.mark.parametrize(
    ("head", "prefix", "task", "saved"),
    [
        ("none", "", "FEATURE_EXTRACTION", None),
        ("classifier", "bert.", "SEQ_CLS", ["classifier"]),
        ("masked_lm", "bert.", None, None),
    ],
)
def test_a_backbone_has_the_names_of_its_class(head, prefix, task, saved, tmp_path):
    model, params = bert_model(head)
    method = pj.lora(rank=2, targets=["query"])
    frozen, trainable, _ = make(method, params)
    pj.export_peft(tmp_path, model, method, frozen, trainable)
    config = config_of(tmp_path)
    module = f"{prefix}encoder.layer.{{}}.attention.self.query"
    assert config["target_modules"] == [module.format(0), module.format(1)]
    assert (config["task_type"], config["modules_to_save"]) == (task, saved)
    held = {name for name in tensors_of(tmp_path) if "lora" not in name}
    extra = {"classifier.weight", "classifier.bias"} if saved else set()
    assert held == {f"base_model.model.{name}" for name in extra}
    again = pj.import_peft(tmp_path, model, params)
    assert_close(again[0].merge(*again[1:]), method.merge(frozen, trainable), 0)


def test_a_trained_head_that_the_class_lacks_must_be_left_out_by_name(tmp_path):
    model, params = bert_model("mean_classifier")
    method = pj.chain(pj.lora(rank=2, targets=["query"]), pj.unfreeze(["head"]))
    frozen, trainable, _ = make(method, params)
    with pytest.raises(PeftError, match=r"BertModel has no such tensor; leave_out=\['head/classifier'\]"):
        pj.export_peft(tmp_path, model, method, frozen, trainable)
    with pytest.raises(PeftError, match="leave_out: 'heads' is not trained"):
        pj.export_peft(tmp_path, model, method, frozen, trainable, leave_out=["heads"])
    pj.export_peft(tmp_path, model, method, frozen, trainable, leave_out=["head/classifier"])
    assert len(tensors_of(tmp_path)) == 4


def test_dora_on_a_tied_embedding_is_refused(tmp_path):
    model, params = bert_model("masked_lm")
    method = pj.dora(rank=2, targets=["word"])
    frozen, trainable, _ = make(method, params)
    with pytest.raises(PeftError, match=r"'cls\.predictions\.decoder\.weight' too"):
        pj.export_peft(tmp_path, model, method, frozen, trainable)
