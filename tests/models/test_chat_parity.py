"""Chat templates and decoder tokenizers against transformers: the same text, ids and assistant masks."""

import pytest
import tiny_language as tiny

from peftjax.text.chat import compile_template, render
from peftjax.text.tokenizer import load_tokenizer
from peftjax.train.data.language.conversations import Conversation, tokenize_conversations

pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=[False, True], ids=["no_bos", "bos"])
def both(request, tmp_path_factory):
    folder = tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=request.param)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return load_tokenizer(folder, decoder=True), theirs


@pytest.mark.parametrize("name", [*tiny.TEMPLATES, "generation", "forgetful"])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_same_text(both, name, prompt):
    source = {**tiny.TEMPLATES, "generation": tiny.GENERATION, "forgetful": tiny.FORGETFUL}[name]
    ours, theirs = both
    chat = [*tiny.CHAT, {"role": "user", "content": " on the mat \n", "tool_calls": None}]
    tools = [{"type": "function", "function": {"name": "f", "description": "é < 3"}}]
    template = compile_template(source, ours.special_tokens)
    expected = theirs.apply_chat_template(
        chat, tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
    )
    assert render(template, chat, tools=tools, add_generation_prompt=prompt) == expected


def test_the_same_assistant_mask(both):
    ours, theirs = both
    expected = theirs.apply_chat_template(
        tiny.CHAT, chat_template=tiny.GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    template = compile_template(tiny.GENERATION, ours.special_tokens)
    (example,) = tokenize_conversations([Conversation(tuple(tiny.CHAT), None, "line 1")], template, ours)
    assert example.ids.tolist() == expected["input_ids"]
    assert example.own.astype(int).tolist() == expected["assistant_masks"]


def test_the_same_special_tokens_and_ids(both):
    ours, theirs = both
    text = "hello there <|eot|> é\n\n the cat"
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert [*ours.prefix_ids, *ours.token_ids([text])[0]] == theirs(text)["input_ids"]
    ids = theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("flag", [False, True])
def test_the_post_processor_decides_about_bos(tmp_path, flag):
    folder = tiny.save_tokenizer(tmp_path, bos=not flag, settings={"add_bos_token": flag})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_tokenizer(folder, decoder=True)
    assert [*ours.prefix_ids, *ours.token_ids(["hello"])[0]] == theirs("hello")["input_ids"]


def test_a_template_from_its_own_file_or_a_list(tmp_path):
    listed = [{"name": "default", "template": tiny.CHATML}, {"name": "rag", "template": tiny.GEMMA}]
    folder = tiny.save_tokenizer(tmp_path, settings={"chat_template": listed})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert load_tokenizer(folder, decoder=True).chat_templates == theirs.chat_template
    (folder / "chat_template.jinja").write_text(tiny.LLAMA)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert load_tokenizer(folder, decoder=True).chat_template() == theirs.get_chat_template() == tiny.LLAMA
