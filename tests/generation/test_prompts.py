"""`generate` continues exactly what training puts before a completion."""

import json

import pytest
import tiny_language as tiny

from peftjax.cli.prompts import PromptOptions, read_prompts
from peftjax.core.errors import PeftError
from peftjax.text.chat import compile_template
from peftjax.train import adapter_info
from peftjax.train.data.language.completions import read_completions, tokenize_completions
from peftjax.train.data.language.conversations import read_conversations, tokenize_conversations

pytest.importorskip("jinja2", reason="jinja2 is in peftjax[train]")
TEMPLATE = "{% if tools %}TOOLS {{ tools[0].name }}\n{% endif %}" + tiny.CHATML
TOOLS = [{"name": "weather"}]


def prompts_of(tokenizer, adapter=None, **options):
    noted = adapter_info.Noted() if adapter is None else adapter_info.read_noted(adapter)
    return read_prompts(PromptOptions(**options), noted, tokenizer)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("t"), bos=True, settings={"chat_template": TEMPLATE})


def write(path, row):
    path.write_text(json.dumps(row) + "\n")
    return path


def before_the_answer(example):
    return example.ids[: example.own.argmax()].tolist()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the cat"},
        {"prompt": "the cat "},
        {"instruction": "what", "input": "the dog", "system": "kind", "history": [["a", "b"]]},
        {"question": "what is", "context": "the mat"},
    ],
)
@pytest.mark.parametrize("separator", [None, " => "])
def test_prompts_of_a_file(tmp_path, tokenizer, row, known, separator):
    full = write(tmp_path / "full.jsonl", row | {"completion": "sat on"})
    rows = read_completions(full, **({} if separator is None else {"separator": separator}))
    (example,) = tokenize_completions(rows, tokenizer)
    file = full if known else write(tmp_path / "asked.jsonl", row)
    (prompt,) = prompts_of(tokenizer, prompts=file, separator=separator)
    assert prompt.ids == before_the_answer(example)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ({"messages": tiny.CHAT[:1]}, {"messages": tiny.CHAT[:2]}),
        ({"prompt": tiny.CHAT[:3]}, {"prompt": tiny.CHAT[:3], "completion": tiny.CHAT[3:]}),
    ],
)
def test_chats_with_system_and_tools(tmp_path, tokenizer, asked, answered):
    beside = {"tools": TOOLS, "system": "be kind"}
    chats = read_conversations(write(tmp_path / "full.jsonl", answered | beside))
    template = compile_template(TEMPLATE, tokenizer.special_tokens)
    (example,) = tokenize_conversations(chats, template, tokenizer)
    (prompt,) = prompts_of(tokenizer, prompts=write(tmp_path / "a.jsonl", asked | beside), chat=True)
    assert prompt.ids == before_the_answer(example)
    assert "TOOLS weather" in tokenizer.decode(prompt.ids)


def test_a_prompt_of_the_command_line_is_any_text(tokenizer):
    (prompt,) = prompts_of(tokenizer, prompt="the cat")
    assert tokenizer.decode(prompt.ids) == "the cat"
    (prompt,) = prompts_of(tokenizer, prompt="the cat", separator="?")
    assert tokenizer.decode(prompt.ids) == "the cat?"


@pytest.mark.parametrize(
    ("info", "prompt", "file"),
    [
        ({"source": "completions", "rows": {"separator": " -> "}}, "the cat -> ", "the cat -> "),
        ({"source": "corpus", "rows": {"separator": "?"}}, "the cat", "the cat"),
        ({"rows": {"separator": "?"}}, "the cat", "the cat?"),
    ],
)
def test_the_separator_is_the_adapters(tmp_path, tokenizer, monkeypatch, info, prompt, file):
    monkeypatch.setattr(adapter_info, "read_config", lambda folder: {"info": info})
    (made,) = prompts_of(tokenizer, prompt="the cat", adapter=tmp_path)
    assert tokenizer.decode(made.ids) == prompt
    prompts = write(tmp_path / "p.jsonl", {"prompt": "the cat"})
    (made,) = prompts_of(tokenizer, prompts=prompts, adapter=tmp_path)
    assert tokenizer.decode(made.ids) == file


def test_a_prompt_that_is_no_text_is_named_with_its_line(tmp_path, tokenizer):
    with pytest.raises(PeftError, match="line 1: the prompt is 3, not a string"):
        prompts_of(tokenizer, prompts=write(tmp_path / "p.jsonl", {"prompt": 3}))
