"""Each command as a user runs it: what it leaves, what it prints, what it refuses."""

import json
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from checkpoints import no_file_larger_than
from command import refused, run
from support import assert_close

import peftjax as pj
from peftjax.cli.commands import COMMANDS, RUN, Methods
from peftjax.cli.main import main
from peftjax.core.errors import PeftError
from peftjax.models.load import load
from peftjax.train.saved_adapter import open_tuned

STEPS = ["--steps", "30", "--batch-size", "16", "--learning-rate", "2e-2", "--max-length", "16"]


@pytest.fixture(scope="module")
def trained(model_folder, data_folder, tmp_path_factory):
    """A finished run and the command that made it."""
    output = tmp_path_factory.mktemp("run")
    command = ["train", "--model", model_folder, "--data", data_folder / "train.csv"]
    command += ["--eval-data", data_folder / "dev.csv", "--output", output, "--rank", "2", *STEPS]
    main([str(part) for part in command])
    return output, command


def test_train_leaves_an_adapter_and_a_summary(trained):
    output, _ = trained
    summary = json.loads((output / "summary.json").read_text())
    assert summary["accuracy"] > 0.9 > summary["majority_accuracy"]
    assert summary["probe_accuracy"] is not None
    assert summary["eval_texts"] == 21
    assert summary["steps"] == 30
    assert summary["peak_host_bytes"] > 0
    assert sorted(path.name for path in (output / "adapter").iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
    ]
    # rank 2 on q, k, v, output, up, down of 2 layers of width 16 and 32, and the new head
    assert summary["trainable_parameters"] == 2 * 2 * (4 * (16 + 16) + 2 * (16 + 32)) + 16 * 2 + 2


@pytest.mark.slow
def test_the_same_command_again_changes_nothing(trained, capsys):
    output, command = trained
    before = (output / "adapter" / "adapter.safetensors").read_bytes()
    again = json.loads(run(capsys, *command, "--json"))
    assert again["accuracy"] == json.loads((output / "summary.json").read_text())["accuracy"]
    assert (output / "adapter" / "adapter.safetensors").read_bytes() == before


@pytest.mark.slow
def test_eval_gives_the_accuracy_of_the_run(trained, data_folder, capsys):
    output, _ = trained
    adapter = output / "adapter"
    printed = run(capsys, "eval", "--adapter", adapter, "--data", data_folder / "dev.csv", "--json")
    scores = json.loads(printed)
    summary = json.loads((output / "summary.json").read_text())
    assert scores["accuracy"] == pytest.approx(summary["accuracy"])
    assert scores["loss"] == pytest.approx(summary["loss"], rel=1e-5)
    assert scores["texts"] == 21
    assert "accuracy:" in run(capsys, "eval", "--adapter", adapter, "--data", data_folder / "dev.csv")


@pytest.mark.slow
def test_merge_writes_a_folder_with_the_same_outputs(trained, tmp_path, capsys):
    output, _ = trained
    run(capsys, "merge", "--adapter", output / "adapter", "--output", tmp_path / "merged")
    tuned = open_tuned(output / "adapter")
    batch = {"input_ids": jnp.array([[2, 5, 9, 3]])}
    rewritten = tuned.adapter.method.apply(tuned.adapter.frozen, tuned.adapter.trainable)
    model, params = load(tmp_path / "merged", head="classifier")
    assert model.config.labels == ("bad", "good")
    assert_close(model(params, batch), pj.adapt(tuned.model)(rewritten, batch))
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_merge_refuses_the_folder_of_the_base(trained, model_folder, capsys):
    adapter = trained[0] / "adapter"
    assert "choose another" in refused(capsys, "merge", "--adapter", adapter, "--output", model_folder)


@pytest.mark.slow
def test_an_adapter_goes_to_peft_and_back(trained, model_folder, data_folder, tmp_path, capsys):
    adapter, back = trained[0] / "adapter", tmp_path / "back"
    run(capsys, "export", "--adapter", adapter, "--output", tmp_path / "peft", "--base", "someone/model")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("someone/model", "SEQ_CLS")
    command = ["import", "--peft", tmp_path / "peft", "--model", model_folder, "--output", back]
    made = json.loads(run(capsys, *command, "--labels", "bad", "good", "--max-length", "16", "--json"))
    assert made == {"adapter": str(back), "method": "chain", "head": "classifier"}
    # Without the names, the labels are the base's own, and there are as many as the classifier has outputs.
    run(capsys, *command[:-1], tmp_path / "unnamed")
    assert json.loads((tmp_path / "unnamed" / "adapter.json").read_text())["info"]["labels"] == [
        "LABEL_0",
        "LABEL_1",
    ]
    scores = []
    for folder in (adapter, back):
        run(capsys, "merge", "--adapter", folder, "--output", tmp_path / folder.name / "merged")
        main(["eval", "--adapter", str(folder), "--data", str(data_folder / "dev.csv"), "--json"])
        printed = capsys.readouterr()
        assert "head/classifier" not in printed.err  # nothing is drawn that the adapter holds
        scores.append({**json.loads(printed.out), "adapter": None})
    assert scores[0] == scores[1]
    merged = [(tmp_path / name / "merged" / "model.safetensors").read_bytes() for name in ("adapter", "back")]
    assert merged[0] == merged[1]


@pytest.mark.slow
def test_import_and_export_name_what_is_wrong(trained, model_folder, tmp_path, capsys):
    adapter = trained[0] / "adapter"
    assert "leave_out: 'heads'" in refused(
        capsys, "export", "--adapter", adapter, "--output", tmp_path / "peft", "--leave-out", "heads"
    )
    run(capsys, "export", "--adapter", adapter, "--output", tmp_path / "peft")
    command = ["import", "--peft", tmp_path / "peft", "--output", tmp_path / "back", "--model"]
    assert "has no head 'clasifier'; closest: 'classifier'" in refused(
        capsys, *command, model_folder, "--head", "clasifier"
    )
    assert "3 labels were given; the classifier has 2 outputs" in refused(
        capsys, *command, model_folder, "--labels", "a", "b", "c"
    )
    assert "load the model with the head it belongs to" in refused(
        capsys, *command, model_folder, "--head", "none"
    )
    assert "does not exist" in refused(capsys, *command, "nowhere")
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
def test_options_come_from_yaml_and_the_command_line_wins(model_folder, data_folder, tmp_path, capsys):
    options = tmp_path / "run.yaml"
    options.write_text(
        f"model: {model_folder}\ndata: {data_folder / 'train.csv'}\nmethod: dora\nrank: 3\n"
        f"targets: [query, value]\noutput: {tmp_path / 'run'}\nsteps: 4\nbatch_size: 8\n"
        "max_length: 16\nprobe: false\nlearning_rate: 1e-3\n"
    )
    summary = json.loads(run(capsys, "train", "--config", options, "--steps", "2", "--json"))
    assert summary["steps"] == 2
    assert summary["probe_accuracy"] is None
    method = summary["method"]["methods"][0]
    assert (method["name"], method["rank"], method["targets"]) == ("dora", 3, ["query", "value"])


def test_methods_and_inspect(model_folder, capsys):
    names = [row["name"] for row in json.loads(run(capsys, "methods", "--json"))]
    assert names == list(pj.METHODS)
    found = json.loads(
        run(capsys, "inspect", "--model", model_folder, "--rank", "2", "--targets", "up", "--json")
    )
    assert found["trainable_parameters"] == 2 * 2 * (16 + 32)
    becomes = {row["parameter"]: row["becomes"] for row in found["parameters"]}
    assert [name for name, what in becomes.items() if what != "frozen"] == ["blocks/feed_forward/up/kernel"]
    assert "blocks/feed_forward/up/kernel" in run(capsys, "inspect", "--model", model_folder)


def test_inspect_shows_an_adapter(trained, capsys):
    assert "lora" in run(capsys, "inspect", "--adapter", trained[0] / "adapter")


@pytest.mark.slow
def test_a_method_of_blocks_is_trained_and_evaluated_and_says_that_it_cannot_leave(
    model_folder, data_folder, tmp_path, capsys
):
    data, out = data_folder / "train.csv", tmp_path / "out"
    run(capsys, "train", "--model", model_folder, "--data", data, "--method", "pfeiffer",
        "--method-options", "size=2", "--steps", "2", "--no-probe", "--output", out)  # fmt: skip
    assert "accuracy" in run(capsys, "eval", "--adapter", out / "adapter", "--data", data)
    assert "added" in run(capsys, "inspect", "--model", model_folder, "--method", "pfeiffer")
    for command in ("merge", "export"):
        with pytest.raises(SystemExit):
            run(capsys, command, "--adapter", out / "adapter", "--output", tmp_path / command)
        assert "'blocks/pfeiffer/" in capsys.readouterr().err


@pytest.mark.slow
def test_train_tells_a_method_how_many_steps_there_are(model_folder, data_folder, tmp_path):
    command = ["train", "--model", model_folder, "--data", data_folder / "train.csv", "--output", tmp_path]
    main(
        [str(part) for part in (*command, "--method", "snella", "--rank", "2", "--no-probe", "--steps", "3")]
    )
    made = json.loads((tmp_path / "adapter" / "adapter.json").read_text())["method"]["methods"][0]
    assert (made["name"], made["total_steps"]) == ("snella", 3)


def test_the_documentation_has_every_row_of_the_methods_table(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import generate

    rows = run(capsys, "methods", "--markdown").strip().splitlines()
    assert len(rows) > 30
    pages = re.sub(r"\[(`\w+`)\]\(\w+\.md\)", r"\1", generate.methods_index()).splitlines()
    assert set(rows) <= set(pages)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--learning-rat", "1"], "Unrecognized options: --learning-rat"),
        (["train", "--optimizer", "x"], "invalid choice 'x' for argument '--optimizer'"),
        (["train", "--steps", "1.5"], "--steps"),
        (["train", "--steps"], "Missing value for argument '--steps'"),
        (["train", "--seed", str(2**64)], "seed is 1.84467e+19, but has to be at most 9223372036854775807"),
        (["train", "--seed", "9" * 5000], "--seed"),
        (["train", "--learning-rate", "nan"], "learning_rate is nan"),
        (["train", "--clip-norm", "inf"], "clip_norm is inf"),
        (["train", "--steps", str(10**30)], "steps is 1e+30"),
        (["train", "--alpha", "nan"], "'alpha' is nan"),
        (["train", "--method-options", "init=[a"], "'init' cannot be read"),
        (["train", "--data", "a\0b"], "zero byte"),
        (["merge"], "--output"),
        ([], "Expected one of {train, eval"),
        (["trian"], "Unrecognized options: trian"),
    ],
)
def test_arguments_that_cannot_be_are_one_sentence(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.csv"], "missing.csv does not exist"),
        (["--data", "{data}/no_label.csv"], "label"),
        (["--text-column", "sentence"], "sentence"),
        (["--eval-data", "{data}/unseen.csv"], "'ugly'"),
        (["--targets", "q_porj"], "closest"),
        (["--targets", "query", "upp"], "'upp' matched no parameter"),
        (["--method", "lorra"], "closest: 'lora'"),
        (["--method-options", "ranc=3"], "unknown option 'ranc'"),
        (["--method-options", "ranc"], "name=value"),
        (["--rank", "100"], "larger than"),
        (["--model", "nowhere"], "does not exist"),
        (["--batch-size", "10", "--grad-accumulation", "3"], "divisor"),
        (["--remat", "everything"], "everything_saveable"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments, message, model_folder, data_folder, tmp_path, capsys
):
    output = tmp_path / "run"
    good = [
        "--model",
        model_folder,
        "--data",
        data_folder / "train.csv",
        "--eval-data",
        data_folder / "dev.csv",
    ]
    given = [str(argument).format(data=data_folder) for argument in arguments]
    assert message in refused(capsys, "train", *good, "--output", output, *STEPS, *given)
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "closest: 'learning_rate'"),
        ("- 1\n", "options by name"),
        ("a: &a [1]\nb: [*a, *a]\n", "an alias has no use here"),
        ("rank: 1\nrank: 2\n", "'rank' stands there twice"),
        ("rank: {a: 1}\n", "'rank' is a dict"),
        ("targets: [[a]]\n", "'targets' is a list"),
        ("targets: [--json]\n", "would be read as another option"),
        ("rank: 2001-01-01\n", "'rank' is a date"),
        ("rank: 2001-13-45\n", "is not YAML"),
        ("rank: !!binary a\n", "is not YAML"),
        ("rank: !!python/name:os.system\n", "is not YAML"),
        ("[" * 5000, "nests too deeply"),
        ("rank: " + "9" * 5000, "is not YAML"),
        ("rank: a\n", "--rank"),
        ("data: a" + "b" * 2**20, "larger than"),
        ("{[a]: 1}", "is not YAML"),
        ("rank: 1\0", "is not YAML"),
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
def test_a_yaml_file_that_cannot_be_is_one_sentence(text, message, tmp_path, capsys):
    options = tmp_path / "run.yaml"
    options.write_text(text)
    assert message in refused(capsys, "train", "--config", options)
    options.write_bytes(b"rank: \xff")
    assert "cannot read" in refused(capsys, "train", "--config", options)


def test_an_output_folder_of_another_run_is_left_alone(trained, capsys):
    output, command = trained
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert "belongs to another run" in refused(capsys, *command, "--rank", "3")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_an_adapter_of_another_model_is_refused(trained, other_model_folder, data_folder, capsys):
    text = refused(
        capsys, "eval", "--adapter", trained[0] / "adapter", "--model", other_model_folder, "--data",
        data_folder / "dev.csv",
    )  # fmt: skip
    assert "this model needs" in text


def test_a_truncated_model_is_refused(model_folder, data_folder, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    text = refused(
        capsys,
        "train",
        "--model",
        tmp_path,
        "--data",
        data_folder / "train.csv",
        "--output",
        tmp_path / "run",
    )
    assert "model.safetensors is not a complete safetensors file" in text


def test_labels_the_classifier_does_not_know_are_named_with_their_line(trained, data_folder, capsys):
    text = refused(capsys, "eval", "--adapter", trained[0] / "adapter", "--data", data_folder / "unseen.csv")
    assert "'ugly'" in text
    assert "line 3" in text


def test_the_adapter_applies_in_ones_own_code(trained):
    tuned = open_tuned(trained[0] / "adapter")
    method, frozen, trainable = tuned.adapter.method, tuned.adapter.frozen, tuned.adapter.trainable
    batch = {"input_ids": jnp.array([[2, 4, 5, 3], [2, 12, 13, 3]])}
    logits = jax.jit(lambda t, f: pj.adapt(tuned.model)(method.apply(f, t), batch))(trainable, frozen)
    assert [tuned.adapter.info["labels"][n] for n in logits.argmax(-1)] == ["good", "bad"]


@pytest.mark.slow
def test_a_train_whose_disk_is_full_prints_no_traceback(trained, tmp_path, capsys):
    _, command = trained
    given = [*command, "--no-probe", "--steps", "4", "--save-every", "2", "--output", tmp_path / "run"]
    with no_file_larger_than(2000), pytest.raises(SystemExit) as ended:
        main([str(part) for part in given])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "cannot write a checkpoint to" in said.strip().splitlines()[-1]
    assert "Traceback" not in said


def test_what_a_library_logs_of_an_exception_has_no_traceback_and_of_an_interrupt_nothing(
    monkeypatch, capsys
):
    def methods(command, console):
        for error in (KeyboardInterrupt(), ValueError("x")):
            try:
                raise error
            except BaseException:
                logging.getLogger("orbax").exception("it failed with %r", error)
        raise PeftError("the disk is full")

    monkeypatch.setitem(RUN, Methods, methods)
    assert refused(capsys, "methods") == "peftjax: the disk is full"
    with pytest.raises(SystemExit):
        main(["methods"])
    said = capsys.readouterr().err
    assert "it failed with ValueError('x')" in said
    assert "KeyboardInterrupt" not in said
    assert "Traceback" not in said
