"""Chat templates: a conversation as the one text that a model was tuned on.

A template is a Jinja program of the checkpoint's author. It is run in Jinja's sandbox, with the
functions and settings that `transformers.apply_chat_template` gives it, so the text is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from peftjax.errors import PeftError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""`role`, `content`, and what else the template reads, such as `tool_calls`."""

# Noncharacters of Unicode: they stand around the assistant's words while these are looked for.
_START, _END = "\ufdd0", "\ufdd1"
_START_NAME, _END_NAME = "peftjax_generation_start", "peftjax_generation_end"


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template.

    Attributes:
        compiled: Jinja's form of it.
        variables: what it sees beside the messages: the special tokens by name.
        marks_generation: whether the template says itself, by `{% generation %}`, which parts of the
            text the assistant generates.
    """

    compiled: jinja2.Template
    variables: Mapping[str, Any]
    marks_generation: bool


def compile_template(
    source: str, special_tokens: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now
) -> ChatTemplate:
    """Compile a template.

    Args:
        source: Jinja source, from `Tokenizer.chat_template`.
        special_tokens: `bos_token` and so on, from `Tokenizer.special_tokens`.
        now: the clock of `strftime_now`; some templates write the date.

    Raises:
        PeftError: when the source is not Jinja.
    """
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_extension(), "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
        compiled = environment.from_string(source)
    except Exception as error:  # Jinja folds constants as it compiles, so 1 // 0 can fail here too.
        raise PeftError(f"the chat template is not valid Jinja: {error or type(error).__name__}") from error
    return ChatTemplate(compiled, dict(special_tokens), _START_NAME in names)


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The conversation as text, special tokens included.

    Args:
        template: from `compile_template`.
        messages: the conversation; a key whose value is None counts as absent.
        add_generation_prompt: end with what introduces the assistant's next turn.
        tools: JSON schemas of functions that the model may call.
        variables: further variables of this template, such as `enable_thinking`.

    Raises:
        PeftError: when the template refuses the conversation or fails on it.
    """
    try:
        return template.compiled.render(
            {
                **template.variables,
                _START_NAME: "",
                _END_NAME: "",
                **variables,
                "messages": [_present(message) for message in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
    except Exception as error:  # A program of somebody else can fail in every way: 1 // 0, endless recursion.
        what = str(error) or type(error).__name__
        raise PeftError(f"the chat template cannot render the conversation: {what}") from error


def render_marked(
    template: ChatTemplate, messages: Sequence[Message], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the parts `text[start:end]` that stand in `{% generation %}` blocks.

    Args:
        template: one that `marks_generation`.
        messages: the conversation.
        options: as of `render`.

    Raises:
        PeftError: as `render`, or when the template changes the text of a block after the block.
    """
    text = render(template, messages, **options)
    marked = render(template, messages, **options, **{_START_NAME: _START, _END_NAME: _END})
    pieces = re.split(f"([{_START}{_END}])", marked)
    if "".join(pieces[0::2]) != text or pieces[1::2] != [_START, _END] * (len(pieces) // 4):
        raise PeftError(
            "the parts that the chat template puts in {% generation %} cannot be found in its text: it "
            "changes them afterwards, or a message has one of the characters U+FDD0 and U+FDD1"
        )
    ends = [0]
    for piece in pieces[0::2]:
        ends.append(ends[-1] + len(piece))
    return text, list(zip(ends[1:-1:2], ends[2:-1:2]))


def _present(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _to_json(value: Any, **options: Any) -> str:
    """JSON as it stands: Jinja's own filter escapes HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _generation_extension() -> type:
    """The tag `{% generation %}`: its body, between two variables that `render` fills."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (nodes.Output([nodes.Name(name, "load")]) for name in (_START_NAME, _END_NAME))
            return nodes.Scope([start, *body, end]).set_lineno(line)

    return Generation
