"""`peftjax plan` prints what `pj.plan` says of the step, of a folder that has no weights."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from command import refused, run

import peftjax as pj
from peftjax.cli import plan as cli_plan
from peftjax.cli.plan_search import POLICIES, print_search
from peftjax.models.llama import LLAMA
from peftjax.planner import machine
from peftjax.planner.compiling import DoesNotFit
from peftjax.planner.result import Bytes, Plan
from peftjax.planner.roofline import Roofline
from peftjax.planner.search import Attempt, Found, meshes
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


def test_a_name_a_file_and_a_folder_are_models(folders, monkeypatch, capsys):
    """Without compiling: what the library is asked."""
    asked = {}

    def plan(method, model, params, batch, **options):
        asked.update(model=model, params=params, batch=batch, **options)
        raise DoesNotFit("too large", 2**34, 2**33)

    monkeypatch.setattr(cli_plan, "plan", plan)
    command = ["plan", "--batch-size", "2", "--max-length", "16", "--param-dtype", "bfloat16", "--json"]
    found = json.loads(run(capsys, *command, "--model", "llama-3-8b", "--topology", "h200:8"))
    assert found == {"fits": False, "needed": 2**34, "capacity": 2**33, "reason": "too large"}
    assert asked["target"] == "h200:8"
    assert asked["model"].num_layers == 32
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(asked["params"])} == {"bfloat16"}
    run(capsys, *command, "--model", folders["decoder"] / "config.json")
    assert asked["model"].num_layers == 2
    run(capsys, *command, "--model", "vit-h")
    assert asked["batch"]["pixel_values"].shape == (2, 3, 224, 224)


def made_up(rows):
    """A plan of so many rows, of which a device holds 5."""
    sizes = Bytes(*(10 * rows if kind.name == "arguments" else 0 for kind in dataclasses.fields(Bytes)))
    return Plan("lora", "h200", "made up", sizes, 0, 1, (), 1, 0.1, capacity=50, roofline=Roofline(1, 2, 3))


@pytest.fixture
def counted(monkeypatch):
    """The numbers of rows that are asked for, of steps that are made up."""
    asked = []

    def plan(method, model, params, batch, **options):
        asked.append((len(batch["labels"].shape), model.remat, options["mesh"], *batch["labels"].shape))
        return made_up(batch["labels"].shape[0])

    monkeypatch.setattr(cli_plan, "plan", plan)
    return asked


def test_the_largest_batch_is_searched(folders, counted, capsys):
    command = ["plan", "--model", folders["decoder"], "--search", "batch", "--batch-size", "2"]
    found = json.loads(run(capsys, *command, "--time-limit", "5", "--json"))
    assert (found["best"], found["finished"]) == (5, True)
    assert [one["value"] for one in found["attempts"]] == [2, 4, 8, 6, 5]
    assert found["attempts"][-1]["plan"]["capacity"] == 50
    text = run(capsys, *command)
    assert re.search(r"^batch 5$", text, re.MULTILINE)
    assert "lora on h200" in text


def test_what_a_time_limit_leaves_is_said(counted, capsys):
    attempts = tuple(Attempt(n, "fits" if n < 6 else "does not fit", made_up(n)) for n in (2, 4, 8, 6))
    print_search("batch", Found(attempts[1], attempts, finished=False))
    text = capsys.readouterr().out
    assert "batch 4 (the time limit ended the search; 6 does not fit)" in text
    tried = (Attempt("none", "does not compile", reason="it has no such heads"),)
    print_search("remat", Found(None, tried, ("save_attention",), finished=False))
    text = capsys.readouterr().out
    assert "none that fits is known (the time limit ended the search; not tried: save_attention)" in text
    assert "remat none: it has no such heads" in text


def test_rows_are_as_long_as_the_model_reads(folders, counted, capsys):
    command = ["plan", "--model", folders["decoder"], "--search", "length", "--batch-size", "2", "--json"]
    assert json.loads(run(capsys, *command))["best"] == DECODER["max_position_embeddings"]


def test_policies_and_meshes_are_tried_in_turn(folders, counted, capsys):
    command = ["plan", "--model", folders["decoder"], "--batch-size", "4", "--json"]
    found = json.loads(run(capsys, *command, "--search", "remat"))
    assert found["best"] == "none"
    assert [policy for _, policy, *_ in counted] == list(POLICIES)
    counted.clear()
    text = run(capsys, *command[:-1], "--search", "mesh")
    wanted = meshes(len(jax.devices()), rows=4, heads=2)
    assert [mesh for _, _, mesh, *_ in counted] == wanted
    assert f"mesh {wanted[0]}\n" in text


def test_a_search_needs_a_target_with_a_limit(folders, monkeypatch, capsys):
    unlimited = dataclasses.replace(made_up(1), target="cpu", capacity=None)
    monkeypatch.setattr(cli_plan, "plan", lambda *given, **options: unlimited)
    command = ["plan", "--model", folders["decoder"], "--search", "remat"]
    assert "memory of 'cpu' is not known" in refused(capsys, *command)


def test_a_name_has_no_weights_to_train(capsys):
    assert "llama-3-8b is a configuration without weights" in refused(
        capsys, "train", "--model", "llama-3-8b", "--data", "chats.jsonl"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time-limit", "0"], "time_limit is 0.0, but has to be a positive number"),
        (["--target", "h200:0"], "no target is called 'h200:0'; closest: 'h200'"),
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
