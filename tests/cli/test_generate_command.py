"""`peftjax generate` as a user runs it, on a tiny Llama folder."""

import json
import sys
from dataclasses import asdict

import jax
import numpy as np
import pytest
from support import noisy
from tiny_decoder import VALUES
from tiny_language import CHATML, save_tokenizer

import peftjax as pj
from peftjax.adapters.files import save_adapter
from peftjax.cli import report
from peftjax.cli.main import main
from peftjax.generation.text import chat_ids, prompt_ids, write
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config
from peftjax.models.save import save
from peftjax.text.chat import compile_template
from peftjax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
PROMPT = "the cat sat on"
NEW = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that writes from the whole vocabulary; the token it writes fourth after PROMPT ends a text."""
    folder = tmp_path_factory.mktemp("decoder")
    save_tokenizer(folder, bos=True, settings={"chat_template": CHATML})
    tokenizer = load_tokenizer(folder, decoder=True)
    config = read_config({**VALUES, "vocab_size": tokenizer.vocab_size})
    model = decoder(config)
    params = jax.jit(model.init)(jax.random.key(0))
    save(folder, model, params)
    ids = np.array(tokenizer.encode([PROMPT], 100))
    made = pj.generate(model, params, {"input_ids": ids}, max_new_tokens=4).tokens[0].tolist()
    assert made[3] not in made[:3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [made[3]]}))
    (folder / "expected.json").write_text(json.dumps(made))
    return folder


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """An adapter, and the folder with it merged."""
    place = tmp_path_factory.mktemp("adapter")
    model, params = pj.load(folder, head="causal_lm")
    method = pj.lora(rank=2, targets=["query", "down"])
    frozen, trainable = method.init(jax.random.key(3), params)
    trainable = noisy(trainable, scale=0.2)
    info = {"model": str(folder), "head": "causal_lm", "labels": [], "max_length": 64}
    save_adapter(place, method, frozen, trainable, seed=3, info=info)
    merged = tmp_path_factory.mktemp("merged")
    save(merged, model, method.merge(frozen, trainable))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (merged / name).write_bytes((folder / name).read_bytes())
    return place, merged


def run(capsys, *arguments):
    main(["generate", *map(str, arguments)])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["generate", *map(str, arguments)])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def base_text(folder):
    """What the model writes after PROMPT."""
    tokenizer = load_tokenizer(folder, decoder=True)
    made = json.loads((folder / "expected.json").read_text())
    whole = tokenizer.decode([*tokenizer.encode([PROMPT], 100)[0], *made])
    assert whole.startswith(PROMPT)
    return whole[len(PROMPT) :]


def test_the_text_and_where_it_stops(folder, capsys):
    rows = json.loads(run(capsys, "--model", folder, "--prompt", PROMPT, *NEW, "--json"))
    assert rows == [{"prompt": PROMPT, "text": base_text(folder), "tokens": 4, "stopped": True}]


def test_on_a_mesh_it_writes_and_merges_the_same(folder, adapter, capsys, tmp_path):
    place, merged = adapter
    mesh = ["--mesh", "fsdp=2,tensor=2,data=2"]
    wanted = run(capsys, "--model", merged, "--prompt", PROMPT, *NEW, "--json")
    assert run(capsys, "--adapter", place, "--prompt", PROMPT, *NEW, *mesh, "--json") == wanted
    main(["merge", "--model", str(folder), "--adapter", str(place), "--output", str(tmp_path), *mesh])
    one, other = (pj.load(path)[1] for path in (merged, tmp_path))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, other)


def test_text_appears_as_it_is_written(folder, capsys, monkeypatch):
    """On a terminal piece by piece, elsewhere as a whole: the same text."""
    options = ["--model", folder, "--prompt", "is the", "--temperature", "0.8", "--top-p", "0.9", *NEW]
    whole = run(capsys, *options)
    pieces, put = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", lambda text: [pieces.append(text), put(text)][1])
    assert run(capsys, *options) == whole
    assert len([piece for piece in pieces if piece]) > 3


def test_a_file_of_prompts(folder, capsys, tmp_path):
    """Three prompts of other lengths, two at a time, each as on its own; a line ends each, as in training."""
    prompts = [PROMPT, "what", "the answer to the question is"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"question": prompt}) + "\n" for prompt in prompts))
    rows = json.loads(run(capsys, "--model", folder, "--prompts", file, "--batch-size", 2, *NEW, "--json"))
    tokenizer = load_tokenizer(folder, decoder=True)
    ids = [prompt_ids(tokenizer, prompt + "\n") for prompt in prompts]
    assert len({len(row) for row in ids}) == 3
    options = {"max_new_tokens": 8, "batch_size": 1, "key": jax.random.key(0)}
    alone = write(*pj.load(folder, head="causal_lm"), tokenizer, ids, **options)
    assert rows == [{"prompt": prompt + "\n", **asdict(made)} for prompt, made in zip(prompts, alone)]
    report.print_written(rows)
    printed = capsys.readouterr().out
    assert all(f"[{number}] {row['text']}" in printed for number, row in enumerate(rows, start=1))


def test_chats(folder, capsys, tmp_path):
    """A prompt is the user's turn, and a file may hold whole conversations."""
    tokenizer = load_tokenizer(folder, decoder=True)
    asked = [{"role": "user", "content": "hello"}]
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    template = compile_template(tokenizer.chat_template(), tokenizer.special_tokens)
    assert chat_ids(tokenizer, template, asked) == tokenizer.token_ids([text])[0]
    (row,) = json.loads(run(capsys, "--model", folder, "--chat", "--prompt", "hello", *NEW, "--json"))
    longer = [*asked, {"role": "assistant", "content": "hi"}, *asked]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in (asked, longer)))
    rows = json.loads(run(capsys, "--model", folder, "--chat", "--prompts", file, *NEW, "--json"))
    assert rows[0]["text"] == row["text"] != rows[1]["text"]
    assert rows[1]["prompt"] == longer
    file.write_text(json.dumps({"messages": longer[:2]}))
    assert "none to answer" in refused(capsys, "--model", folder, "--chat", "--prompts", file)


def test_an_adapter_writes_what_the_merged_model_writes(folder, adapter, capsys):
    place, merged = adapter
    with_adapter = run(capsys, "--adapter", place, "--prompt", PROMPT, *NEW)
    assert with_adapter == run(capsys, "--model", merged, "--prompt", PROMPT, *NEW)
    assert with_adapter.rstrip("\n") != base_text(folder)


def test_bad_input_is_one_sentence(folder, model_folder, capsys, tmp_path):
    good = ["--model", folder, "--prompt", PROMPT]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    other = tmp_path / "other"
    _, params = pj.load(model_folder)
    method = pj.lora(rank=2, targets=["query"])
    save_adapter(other, method, *method.init(jax.random.key(0), params), seed=0, info={"head": "classifier"})
    for arguments, message in [
        (["--model", folder], "--prompt or --prompts"),
        ([*good, "--prompts", prompts], "one of the two"),
        (["--prompt", PROMPT], "needs a model"),
        (["--model", model_folder, "--prompt", PROMPT], "an encoder, and has nothing to generate"),
        (["--model", tmp_path / "nowhere", "--prompt", PROMPT], "does not exist"),
        ([*good, "--adapter", tmp_path], "holds no adapter"),
        ([*good, "--adapter", other], "the head 'classifier' and has nothing to generate"),
        ([*good, "--top-k", "4"], "no effect at temperature 0"),
        ([*good, "--temperature", "1", "--top-p", "1.5"], "top_p"),
        ([*good, "--max-new-tokens", "0"], "max_new_tokens is 0, but has to be at least 1"),
        ([*good, "--seed", "-1"], "seed is -1, but has to be at least 0"),
        ([*good, "--seed", str(2**63)], "seed is 9.22337e+18, but has to be at most"),
        ([*good, "--temperature", "nan"], "temperature is nan, but has to be at least 0"),
        ([*good, "--max-new-tokens", str(10**9)], "max_new_tokens is 1e+09, but has to be at most 1000000"),
        ([*good, "--dtype", "float8"], "float8"),
        (["--model", folder, "--prompts", prompts], "line 2: the prompt is 3"),
        (["--model", folder, "--prompts", prompts, "--prompt-column", "text"], "no prompt column 'text'"),
        (["--model", folder, "--prompts", "missing.jsonl"], "missing.jsonl does not exist"),
    ]:
        assert message in refused(capsys, *arguments), arguments
