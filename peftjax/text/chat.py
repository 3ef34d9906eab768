"""Chat templates: a conversation as the one text that a model was tuned on.

A template is a Jinja program of the checkpoint's author. It is run in Jinja's sandbox, with the
functions and settings that `transformers.apply_chat_template` gives it, so the text is the same; and in a
process of its own, so that one that loops or multiplies strings ends by itself (see `chat_worker`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.text import chat_worker
from peftjax.text.chat_worker import END_NAME, SECONDS, START_NAME

Message = Mapping[str, Any]
"""`role`, `content`, and what else the template reads, such as `tool_calls`."""

# Noncharacters of Unicode: they stand around the assistant's words while these are looked for.
_START, _END = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template.

    Attributes:
        worker: the process that runs it.
        variables: what it sees beside the messages: the special tokens by name.
        marks_generation: whether the template says itself, by `{% generation %}`, which parts of the
            text the assistant generates.
        now: the clock of `strftime_now`.
        reads_calls: whether the template reads the `tool_calls` of a message; where it does not, they are the
            text of a message that has no other.
    """

    worker: _Worker
    variables: Mapping[str, Any]
    marks_generation: bool
    now: Callable[[], datetime]
    reads_calls: bool = True


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
    worker = _Worker(source)
    return ChatTemplate(worker, dict(special_tokens), worker.start(), now, "tool_calls" in source)


class _Worker:
    """The process of one template; one that ended is restarted for the next conversation."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def start(self) -> bool:
        """Compile the template in a new process; whether it marks what the assistant generates."""
        command = [sys.executable, "-P", os.path.abspath(chat_worker.__file__)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        weakref.finalize(self, _end, self.process)
        answer = self._ask({"source": self.source})
        if "error" in answer:
            self._end()
            raise PeftError(f"the chat template is not valid Jinja: {answer['error']}")
        return answer["marks"]

    def render(self, variables: Mapping[str, Any], now: datetime) -> str:
        with self.lock:
            if self.process is None:
                self.start()
            answer = self._ask({"variables": variables, "now": now.isoformat()})
        if "error" in answer:
            raise PeftError(f"the chat template cannot render the conversation: {answer['error']}")
        return answer["text"]

    def _ask(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a line; an error where the process ended, or took too long and is ended."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            line = json.dumps(given, default=str).encode() + b"\n"
        except (ValueError, TypeError, RecursionError) as error:
            return {"error": str(error)}
        pieces: list[bytes] = []
        end = time.monotonic() + SECONDS
        complete = False
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            output = self.process.stdout.fileno()
            while not complete:
                ready = select.select([output], [], [], max(0.0, end - time.monotonic()))[0]
                piece = os.read(output, 1 << 20) if ready else b""
                if not piece:
                    break
                pieces.append(piece)
                complete = piece.endswith(b"\n")
        except OSError:
            pass
        finally:
            if not complete:  # An interrupt too: the answer to come would be taken for the next one's.
                self._end()
        if not complete:
            return {"error": f"it takes more than {SECONDS} seconds, or ended its process"}
        return json.loads(b"".join(pieces))

    def _end(self) -> None:
        if self.process is not None:
            _end(self.process)
        self.process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


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
    seen = {
        **template.variables,
        START_NAME: "",
        END_NAME: "",
        **variables,
        "messages": [_present(message, template.reads_calls) for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return template.worker.render(seen, template.now())


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
    marked = render(template, messages, **options, **{START_NAME: _START, END_NAME: _END})
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


def _present(message: Message, reads_calls: bool) -> dict[str, Any]:
    present = {key: value for key, value in message.items() if value is not None}
    given = present.get("tool_calls")
    if not reads_calls and given and isinstance(given, list) and not present.get("content"):
        calls = [call.get("function", call) if isinstance(call, dict) else call for call in given]
        present["content"] = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    return present
