"""`train`, `eval`, `merge` and `inspect` of a decoder, as a user runs them."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder_folder
import tiny_language
import tokenizers
from command import refused, run
from support import assert_close

import peftjax as pj
from peftjax.cli.main import main
from peftjax.io import checkpoint
from peftjax.models.families import FAMILIES
from peftjax.models.load import load
from peftjax.models.save import save
from peftjax.text.tokenizer import load_tokenizer
from peftjax.train.saved_adapter import open_tuned

STEPS = ["--steps", "24", "--batch-size", "16", "--learning-rate", "2e-2", "--max-length", "16"]
STEPS += ["--eval-every", "12", "--save-every", "6", "--eval-batch-size", "8"]
# rank 2 on q, k, v, output and on gate, up, down of both layers
TRAINABLE = 2 * 2 * (4 * (16 + 16) + 3 * (16 + 32))
TIMED = ("tokens_per_second", "labels_per_second", "peak_host_bytes")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny_decoder_folder.save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_decoder_folder.write_completions(folder / "train.jsonl", 60)
    tiny_decoder_folder.write_completions(folder / "dev.jsonl", 21)
    rows = [{"text": f"the cat {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(20)]
    tiny_decoder_folder.write_jsonl(folder / "labeled.jsonl", rows)
    chats = [{"messages": tiny_language.CHAT[: 2 + 2 * (i % 2)]} for i in range(12)]
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "a " * 99}
    chats.append({"messages": [question, answer]})
    tiny_decoder_folder.write_jsonl(folder / "chats.jsonl", chats)
    (folder / "short.txt").write_text("the cat")
    return folder


def command_of(decoder, data, output):
    files = ["--data", data / "train.jsonl", "--eval-data", data / "dev.jsonl"]
    return ["train", "--model", decoder, *files, "--output", output, "--rank", "2", *STEPS]


@pytest.fixture(scope="module")
def trained(decoder, data, tmp_path_factory):
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("run")
    main([str(part) for part in command_of(decoder, data, output)])
    return output


def lines(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in TIMED} for row in rows]


def examples(decoder, file):
    """Ids and the place of the first counted one, tokenized by hand."""
    tokenizer = load_tokenizer(decoder, decoder=True)
    for line in file.read_text().splitlines():
        row = json.loads(line)
        prompt, both = tokenizer.token_ids([row["prompt"], row["prompt"] + row["completion"]])
        yield [*both, tokenizer.eos_id], len(prompt)


def test_the_summary_counts_and_the_loss_falls(trained, decoder, data):
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["task"], summary["source"], summary["data"]) == ("language", "completions", "train")
    assert summary["loss"] < 0.5 * summary["loss_before"]
    assert summary["perplexity"] == pytest.approx(np.exp(summary["loss"]))
    assert summary["perplexity_before"] == pytest.approx(np.exp(summary["loss_before"]))
    assert summary["token_accuracy"] > 0.6 > 0.2 > summary["token_accuracy_before"]
    for part, file in (("train", "train.jsonl"), ("eval", "dev.jsonl")):
        found = list(examples(decoder, data / file))
        assert summary[f"{part}_rows"] == len(found)
        assert summary[f"{part}_tokens"] == sum(len(ids) for ids, _ in found)
        assert summary[f"{part}_counted_tokens"] == sum(len(ids) - start for ids, start in found)
        assert summary[f"{part}_efficiency"] == pytest.approx(summary[f"{part}_tokens"] / (16 * len(found)))
        assert not any(summary[f"{part}_cut"].values())
    assert (summary["steps"], summary["trainable_parameters"]) == (24, TRAINABLE)
    losses = {row["step"]: row["eval_loss"] for row in lines(trained) if "eval_loss" in row}
    assert summary["loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert losses[summary["best_step"]] == min(losses.values())
    share = summary["train_counted_tokens"] / summary["train_tokens"]
    assert summary["labels_per_second"] / summary["tokens_per_second"] == pytest.approx(share, rel=0.2)


def test_the_adapter_says_its_task(trained):
    info = json.loads((trained / "adapter" / "adapter.json").read_text())["info"]
    assert (info["task"], info["head"]) == ("language", "causal_lm")
    assert (info["labels"], info["max_length"]) == ([], 16)
    assert info["rows"]["train_on_prompt"] is False


@pytest.mark.slow
def test_eval_is_the_mean_over_counted_tokens(trained, decoder, data, capsys):
    """With uneven batches; compared with log-probabilities of each example by itself."""
    command = ["eval", "--adapter", trained / "adapter", "--data", data / "dev.jsonl", "--json"]
    scores = json.loads(run(capsys, *command, "--batch-size", "4"))
    summary = json.loads((trained / "summary.json").read_text())
    for name in ("loss", "perplexity", "token_accuracy"):
        assert scores[name] == pytest.approx(summary[name], rel=1e-5)
    assert (scores["rows"], scores["counted_tokens"]) == (21, summary["eval_counted_tokens"])
    tuned = open_tuned(trained / "adapter")
    params = tuned.adapter.method.apply(tuned.adapter.frozen, tuned.adapter.trainable)
    chosen = list(examples(decoder, data / "dev.jsonl"))[:6]
    batch = {"input_ids": jnp.array([ids + [0] * (16 - len(ids)) for ids, _ in chosen])}
    logits = np.asarray(pj.adapt(lambda p, b: tuned.model(p, b).dense())(params, batch), np.float64)
    scores_of = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = [
        -scores_of[row, i - 1, ids[i]]
        for row, (ids, start) in enumerate(chosen)
        for i in range(start, len(ids))
    ]
    six = tiny_decoder_folder.write_completions(trained / "six.jsonl", 6)
    of_six = json.loads(run(capsys, "eval", "--adapter", trained / "adapter", "--data", six, "--json"))
    assert of_six["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_continues_bit_for_bit(trained, decoder, data, tmp_path, capsys, monkeypatch):
    command = [str(part) for part in command_of(decoder, data, tmp_path)]
    save_checkpoint = checkpoint.save

    def save_and_stop(checkpoints, state, score):
        save_checkpoint(checkpoints, state, score)
        if state.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(SystemExit) as ended:
            main(command)
    assert ended.value.code == 130
    assert not (tmp_path / "adapter").exists()
    summary = json.loads(run(capsys, *command, "--json"))
    assert summary["loss"] == json.loads((trained / "summary.json").read_text())["loss"]
    assert lines(tmp_path) == lines(trained)
    one, other = (output / "adapter" / "adapter.safetensors" for output in (tmp_path, trained))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_merge_writes_a_folder_that_stands_alone(trained, decoder, tmp_path, capsys):
    (decoder / "generation_config.json").write_text('{"eos_token_id": [1]}')
    merged = tmp_path / "merged"
    run(capsys, "merge", "--adapter", trained / "adapter", "--output", merged)
    beside = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in merged.iterdir()} == beside | {"config.json", "model.safetensors"}
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert load_tokenizer(merged, decoder=True).chat_template() == tiny_language.CHATML
    tuned = open_tuned(trained / "adapter")
    rewritten = tuned.adapter.method.apply(tuned.adapter.frozen, tuned.adapter.trainable)
    batch = {"input_ids": jnp.array([[5, 30, 9, 3]])}
    model, params = load(merged, head="causal_lm")
    adapted = pj.adapt(lambda p, b: tuned.model(p, b).dense())(rewritten, batch)
    assert_close(model(params, batch).dense(), adapted)


@pytest.mark.slow
def test_a_tied_decoder_is_trained_untied_and_opened_so_again(decoder, data, tmp_path, capsys):
    base = shutil.copytree(decoder, tmp_path / "base")
    model, params = load(base)
    kernel = params["head"].pop("output")["kernel"]
    tied = FAMILIES["llama"].build(replace(model.config, tied=True))
    save(base, tied, {**params, "embed": {"word": {"embedding": kernel.T}}})
    command = ["train", "--model", base, "--data", data / "train.jsonl", "--output", tmp_path / "run"]
    run(capsys, *command, *STEPS[2:], "--steps", "2", "--method", "full", "--untie")
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["untied"] is True
    run(capsys, "merge", "--adapter", adapter, "--output", tmp_path / "merged")
    again, merged = load(tmp_path / "merged")
    assert not again.config.tied
    assert np.abs(merged["head"]["output"]["kernel"] - merged["embed"]["word"]["embedding"].T).max() > 1e-3
    asked = ["--prompt", "the cat", "--separator=", "--max-new-tokens", "3", "--json"]
    of_adapter = run(capsys, "generate", "--adapter", adapter, *asked)
    assert of_adapter == run(capsys, "generate", "--model", tmp_path / "merged", *asked)
    sentence = refused(capsys, *command, *STEPS[2:], "--steps", "2", "--method", "full")
    assert "belongs to another run" in sentence


@pytest.mark.slow
def test_packed_chats_from_yaml(decoder, data, tmp_path, capsys):
    """What is packed, cut and left out stands in the summary and in the table."""
    options = tmp_path / "run.yaml"
    options.write_text(
        f"model: {decoder}\ndata: {data / 'chats.jsonl'}\neval_data: {data / 'chats.jsonl'}\n"
        f"output: {tmp_path / 'run'}\nsteps: 1\nbatch_size: 4\npacked: true\nrank: 1\n"
    )
    printed = run(capsys, "train", "--config", options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["source"] == "conversations"
    assert summary["train_cut"]["too_long"] == 1
    assert summary["train_rows"] < 12
    assert summary["train_efficiency"] == summary["train_tokens"] / (64 * summary["train_rows"])
    assert "1 too_long" in printed
    assert "before training" in printed


@pytest.mark.slow
def test_a_decoder_classifies_labeled_texts(decoder, data, tmp_path, capsys):
    """By the last token: with a padding token of the model that is not the tokenizer's."""
    folder = tmp_path / "model"
    shutil.copytree(decoder, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "pad_token_id": 3}))
    labeled = data / "labeled.jsonl"
    arguments = ["--model", folder, "--data", labeled, "--eval-data", labeled, "--output", tmp_path / "run"]
    arguments += ["--steps", "2", "--batch-size", "20", "--max-length", "16", "--rank", "2", "--no-probe"]
    summary = json.loads(run(capsys, "train", *arguments, "--json"))
    assert (summary["task"], summary["labels"]) == ("classification", 2)
    tuned = open_tuned(tmp_path / "run" / "adapter")
    params = tuned.adapter.method.apply(tuned.adapter.frozen, tuned.adapter.trainable)
    tokenizer = load_tokenizer(folder, decoder=True)
    encoded = tokenizer.encode([f"the cat {i}" for i in range(20)], 16)
    hits = 0
    for length in {len(ids) for ids in encoded}:  # no padding
        rows = [i for i, ids in enumerate(encoded) if len(ids) == length]
        batch = {"input_ids": jnp.array([encoded[i] for i in rows])}
        hits += int((pj.adapt(tuned.model)(params, batch).argmax(-1) == jnp.array(rows) % 2).sum())
    assert summary["accuracy"] == pytest.approx(hits / 20)
    save(tmp_path / "saved", tuned.model, tuned.params)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.slow
def test_a_decoders_classifier_is_compared_with_a_probe(decoder, data, tmp_path, capsys):
    labeled = data / "labeled.jsonl"
    arguments = ["--model", decoder, "--data", labeled, "--eval-data", labeled, "--output", tmp_path]
    summary = json.loads(run(capsys, "train", *arguments, "--steps", "1", "--max-length", "16", "--json"))
    assert 0.5 <= summary["probe_accuracy"] <= 1.0


def test_inspect_shows_the_language_head(decoder, capsys):
    found = json.loads(run(capsys, "inspect", "--model", decoder, "--rank", "2", "--json"))
    assert found["trainable_parameters"] == TRAINABLE
    assert "head/output/kernel" in {row["parameter"] for row in found["parameters"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-length", "65"], "made for at most 64 tokens"),
        (["--max-length", "1"], "at least 2"),
        (["--head", "classifier"], "trains the head 'causal_lm'"),
        (["--label-column", "completion", "--task", "language"], "no use for label_column"),
        (["--task", "classification"], "no text column"),
        (["--prompt-column", "promt"], "did you mean 'prompt'"),
        (["--data", "{data}/short.txt", "--eval-data", "missing.txt"], "cannot read missing.txt"),
        (["--data", "docstrings", "--task", "language"], "is for the task classification"),
        (["--best-by", "accuracy", "--learning-rate", "-1"], "learning_rate is -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, message, decoder, data, tmp_path, capsys):
    good = command_of(decoder, data, tmp_path / "run")
    given = [argument.format(data=data) for argument in arguments]
    assert message in refused(capsys, *good, *given)
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_evaluated_on_texts_of_its_task_only(trained, data, capsys):
    command = ["eval", "--adapter", trained / "adapter", "--data"]
    assert "is for the task classification" in refused(capsys, *command, "docstrings")
    text = refused(capsys, *command, data / "dev.jsonl", "--label-column", "prompt")
    assert "no use for label_column" in text
    assert "no eval_data" in refused(capsys, *command, data / "dev.jsonl", "--eval-data", data / "dev.jsonl")


def test_an_encoder_writes_nothing(model_folder, data, tmp_path, capsys):
    arguments = ["train", "--model", model_folder, "--output", tmp_path / "run", "--data"]
    text = refused(capsys, *arguments, data / "train.jsonl", "--task", "language")
    assert "is an encoder and writes no text: give a decoder" in text
    assert "or give a decoder as the model" in refused(capsys, *arguments, data / "train.jsonl")
    text = refused(capsys, *arguments, data / "short.txt", "--task", "classification")
    assert "plain text without labels" in text


def test_a_tokenizer_of_another_model_is_refused(decoder, data, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(decoder, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["the dog"])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = refused(capsys, *command_of(folder, data, tmp_path / "run"))
    assert "use the model's own tokenizer" in text
    assert not (tmp_path / "run").exists()
