from datetime import datetime

import pytest
import tiny_language as tiny

from peftjax.core.errors import PeftError
from peftjax.text.chat import compile_template, render, render_marked

pytest.importorskip("jinja2", reason="jinja2 is in peftjax[train]")

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_the_text_of_each_style():
    chat = tiny.CHAT[:2]
    assert render(compile_template(tiny.CHATML, TOKENS), chat) == (
        "<|im_start|>user\nwhat is the answer?<|im_end|>\n"
        "<|im_start|>assistant\nthe answer is here.\nthe cat.<|im_end|>\n"
    )
    assert render(compile_template(tiny.MISTRAL, TOKENS), chat) == (
        "<s>[INST] what is the answer? [/INST] the answer is here.\nthe cat.</s>"
    )
    assert render(compile_template(tiny.LLAMA, TOKENS), chat[:1], add_generation_prompt=True) == (
        "<s><|header|>user<|end_header|>\n\nwhat is the answer?<|eot|><|header|>assistant<|end_header|>\n\n"
    )
    assert render(compile_template(tiny.GEMMA, TOKENS), chat[:1], add_generation_prompt=True) == (
        "<s><start_of_turn>user\nwhat is the answer?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_variables_dates_and_json():
    source = (
        "{{ strftime_now('%d %b %Y') }} {{ tools | tojson }} {{ mood }} {{ messages[0].name is defined }}"
    )
    template = compile_template(source, {}, now=lambda: datetime(2024, 7, 26))
    text = render(template, [{"role": "user", "name": None}], tools=[{"q": "<é>"}], mood="kind")
    assert text == '26 Jul 2024 [{"q": "<é>"}] kind False'


def test_generation_blocks_are_found():
    template = compile_template(tiny.GENERATION, TOKENS)
    text, spans = render_marked(template, tiny.CHAT)
    assert template.marks_generation
    assert text == render(compile_template(tiny.CHATML, TOKENS), tiny.CHAT)
    said = [message["content"] + "<|im_end|>" for message in tiny.CHAT[1::2]]
    assert [text[start:end] for start, end in spans] == said
    assert not compile_template(tiny.CHATML, TOKENS).marks_generation


def test_a_block_that_is_changed_afterwards_is_an_error():
    source = "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}"
    with pytest.raises(PeftError, match="cannot be found in its text"):
        render_marked(compile_template(source, {}), [])
    template = compile_template("{% generation %}{{ messages[0].content }}{% endgeneration %}", {})
    with pytest.raises(PeftError, match="U\\+FDD0"):
        render_marked(template, [{"role": "user", "content": "\ufdd0"}])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if %}", "not valid Jinja"),
        ("{{ raise_exception('no tools here') }}", "cannot render the conversation: no tools here"),
        ("{{ messages[5]['role'] }}", "cannot render"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ 1 // (messages | length - 4) }}", "cannot render"),
        ("{{ 1 // 0 }}", "chat template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{{ raise_exception.__globals__.json }}", "cannot render"),
    ],
)
def test_a_bad_or_hostile_template_is_an_error(source, says):
    with pytest.raises(PeftError, match=says):
        render(compile_template(source, {}), tiny.CHAT)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ 'a' * 10000000000 }}", "MiB of memory"),
        ("{{ messages[0].content * 2000000 }}", "longer than"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1 seconds",
        ),
    ],
)
def test_a_template_without_bounds_ends_and_the_next_conversation_is_rendered(monkeypatch, source, says):
    template = compile_template("{% if messages | length > 1 %}" + source + "{% else %}x{% endif %}", {})
    monkeypatch.setattr("peftjax.text.chat.SECONDS", 1)
    with pytest.raises(PeftError, match=says):
        render(template, tiny.CHAT)
    monkeypatch.undo()
    assert render(template, tiny.CHAT[:1]) == "x"
