"""`peftjax plan` prints what `pj.plan` says of the step, of a folder that has no weights."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from command import refused, run

import peftjax as pj
from peftjax.models.llama import LLAMA
from peftjax.planner import machine
from peftjax.train.config import TrainConfig
from peftjax.train.optimizer import make_optimizer

DECODER = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER = {
    "model_type": "bert",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a configuration alone."""
    folders = {"decoder": tmp_path_factory.mktemp("decoder"), "encoder": tmp_path_factory.mktemp("encoder")}
    for name, values in (("decoder", DECODER), ("encoder", ENCODER)):
        (folders[name] / "config.json").write_text(json.dumps(values))
    return folders


@pytest.mark.slow
def test_a_decoders_plan_is_that_of_the_library(folders, capsys):
    command = ["plan", "--model", folders["decoder"], "--rank", "2", "--batch-size", "4"]
    found = json.loads(run(capsys, *command, "--max-length", "16", "--json"))
    model = LLAMA.build(LLAMA.read_config(DECODER), head="causal_lm")
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    batch = dict.fromkeys(names, tokens) | {"weights": jax.ShapeDtypeStruct((4, 16), jnp.float32)}
    wanted = pj.plan(
        pj.lora(rank=2),
        model,
        jax.eval_shape(model.init, jax.random.key(0)),
        batch,
        optimizer=make_optimizer(TrainConfig(learning_rate=2e-4), 100),
    )
    assert found["peak"] == wanted.bytes.peak
    assert found["flops"] == wanted.flops
    assert found["trainable_parameters"] == wanted.trainable_parameters
    assert found["bytes"]["batch"] == wanted.bytes.batch == 5 * 4 * 16 * 4


def test_an_encoders_plan_is_a_table_and_trains_the_new_head(folders, capsys):
    command = [
        "plan",
        "--model",
        folders["encoder"],
        "--rank",
        "2",
        "--targets",
        "query",
        "--num-labels",
        "3",
    ]
    text = run(capsys, *command, "--batch-size", "2", "--max-length", "8", "--remat", "nothing_saveable")
    trained = 2 * 2 * (16 + 16) + 16 * 3 + 3
    assert f"on cpu (cpu), {trained:,} trained" in text
    for row in ("weights", "optimizer", "temporaries", "peak", "FLOPs a step"):
        assert re.search(rf"^  {row} ", text, re.MULTILINE)


@pytest.mark.slow
def test_memory_follows_the_options(folders, capsys):
    def found(*more):
        command = ["plan", "--model", folders["decoder"], "--rank", "2", "--batch-size", "4", "--json"]
        return json.loads(run(capsys, *command, "--max-length", "16", *more))

    plain, eight, half = found(), found("--optimizer", "sgd"), found("--dtype", "bfloat16")
    assert eight["bytes"]["optimizer"] < plain["bytes"]["optimizer"]
    assert half["kept"] < plain["kept"]
    assert half["bytes"]["weights"] == plain["bytes"]["weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "h200"], "target 'h200' needs NVIDIA's compiler: pip install"),
        (["--target", "v5e:2x2"], "target 'v5e:2x2' needs the TPU's compiler: pip install libtpu"),
        (["--target", "h20"], "no target is called 'h20'; closest: 'h200'"),
        (["--max-length", "65"], "max_length is 65, but the model was made for at most 64"),
        (["--batch-size", "0"], "batch_size is 0, but has to be at least 1"),
        (["--targets", "q_porj"], "closest"),
        (["--remat", "everything"], "everything_saveable"),
        (["--head", "clasifier"], "closest: 'classifier'"),
        (["--model", "nowhere"], "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_one_sentence(arguments, message, folders, monkeypatch, capsys):
    monkeypatch.setattr(machine, "_is_installed", lambda module: False)
    given = ["--model", folders["decoder"], *arguments]
    assert message in refused(capsys, "plan", *given)
