"""Chats from JSONL or Parquet files, with the parts that the assistant says."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftjax import tree
from peftjax.errors import PeftError
from peftjax.models.chat import ChatTemplate, render, render_marked
from peftjax.models.tokenizer import Tokenizer
from peftjax.train.data.columns import pick_column
from peftjax.train.data.files import read_rows
from peftjax.train.data.language.example import Example, encode_pieces, make_example

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
ASSISTANT = "assistant"
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """One chat, and where it stands (for errors)."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    place: str

    @property
    def group(self) -> str:
        """What decides on which side of the split the chat is: all before the first answer."""
        roles = [message["role"] for message in self.messages]
        asked = self.messages[: roles.index(ASSISTANT)] if ASSISTANT in roles else ()
        return json.dumps(asked or self.messages, sort_keys=True, default=str)


def read_conversations(path: Path, *, messages_column: str | None = None) -> list[Conversation]:
    """The chats of a file: a list of {role, content}, or of ShareGPT's {from, value}, per row.

    A column `tools` (a list of JSON schemas, or its JSON) goes to the chat template, and a string in
    a column `system` becomes the first message.

    Raises:
        PeftError: for a file that cannot be read, an unknown role, or a message of another form.
    """
    found = []
    column = None
    for line, row in read_rows(path):
        place = f"{path}, line {line}"
        if column is None:
            column = pick_column(list(row), messages_column, MESSAGE_COLUMNS, "messages", str(path))
        given = row.get(column)
        if not isinstance(given, list) or not given:
            raise PeftError(f"{place}: {column} is {str(given)[:40]!r}, not a list of messages")
        messages = [_message(message, place) for message in given]
        if system := row.get("system"):
            if not isinstance(system, str):
                raise PeftError(f"{place}: the system is {system!r}, not a string")
            messages.insert(0, {"role": "system", "content": system})
        found.append(Conversation(tuple(messages), _tools(row.get("tools"), place), place))
    if not found:
        raise PeftError(f"the data file {path} has no rows")
    return found


def tokenise_conversations(
    chats: Sequence[Conversation], template: ChatTemplate, tokenizer: Tokenizer
) -> list[Example]:
    """Every chat as ids; each assistant turn with its end-of-turn token is the model's own.

    The turns are exactly what stands in the template's `{% generation %}` blocks. In a template
    without them, a turn is what the chat up to and including it adds to the chat before it with the
    generation prompt, without the white space after the end-of-turn token.

    Raises:
        PeftError: when the template cannot render a chat, writes earlier turns in another way once
            later ones follow, or writes no generation prompt to tell a turn from its header.
    """
    texts = [_pieces(chat, template) for chat in chats]
    ends = _end_ids(tokenizer)
    examples = []
    for pieces in encode_pieces(tokenizer, texts):
        runs = []
        for k, ids in enumerate(pieces):
            own = k % 2 == 1
            stop = None if template.marks_generation or not own else _end_of_turn(ids, ends, tokenizer)
            said = len(ids) if stop is None else stop
            runs += [(ids[:said], own), (ids[said:], False)]
        examples.append(make_example(runs))
    return examples


def count_open_turns(examples: Sequence[Example], tokenizer: Tokenizer) -> int:
    """Turns that do not end in a special token: a model trained on them does not learn to stop."""
    ends = _end_ids(tokenizer)
    total = 0
    for example in examples:
        edges = np.flatnonzero(np.diff(example.own, prepend=False, append=False))
        turns = (example.ids[start:stop] for start, stop in edges.reshape(-1, 2))
        total += sum(_end_of_turn(ids.tolist(), ends, tokenizer) is None for ids in turns)
    return total


def _pieces(chat: Conversation, template: ChatTemplate) -> list[str]:
    """The chat's text in pieces, in turn not said and said by the assistant."""
    try:
        if template.marks_generation:
            text, spans = render_marked(template, chat.messages, tools=chat.tools)
        else:
            text, spans = _turns(chat, template)
    except PeftError as error:
        raise PeftError(f"{chat.place}: {error}") from error
    cuts = [0, *(cut for span in spans for cut in span), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


def _turns(chat: Conversation, template: ChatTemplate) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where each assistant turn begins and ends in it, by rendering prefixes."""

    def text_of(count: int, *, prompt: bool = False) -> str:
        messages = chat.messages[:count]
        return render(template, messages, add_generation_prompt=prompt, tools=chat.tools)

    whole = text_of(len(chat.messages))
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] != ASSISTANT:
            continue
        before, after = text_of(i, prompt=True), text_of(i + 1)
        if not whole.startswith(after):  # Some templates end every chat with eos.
            after = after.removesuffix(template.variables.get("eos_token", ""))
        if not whole.startswith(after):
            raise PeftError(
                f"the chat template writes the chat up to message {i + 1} in another way than the whole "
                "chat (it rewrites earlier turns), so the assistant's turns cannot be found: use a template "
                "with {% generation %} blocks, or give each such turn a row of its own"
            )
        if not after.startswith(before):
            raise PeftError(
                f"the generation prompt of the chat template is not how message {i + 1} begins in the chat, "
                "so the assistant's turns cannot be found: use a template with {% generation %} blocks"
            )
        content = message.get("content")
        said = after[len(before) :].lstrip()
        if isinstance(content, str) and not said.startswith(content.strip()) and before == text_of(i):
            raise PeftError(
                "the chat template writes no generation prompt, so an assistant turn cannot be told from "
                "its header: use a template with add_generation_prompt or {% generation %} blocks"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return tokenizer.special_ids | set(tokenizer.stop_ids)


def _end_of_turn(ids: Sequence[int], ends: frozenset[int], tokenizer: Tokenizer) -> int | None:
    """How many ids there are up to the last special one, if only white space follows it."""
    last = max((i for i, id in enumerate(ids) if id in ends), default=None)
    if last is None or tokenizer.decode(ids[last + 1 :], skip_special_tokens=False).strip():
        return None
    return last + 1


def _message(message: object, place: str) -> Mapping[str, Any]:
    """A message checked, ShareGPT's in the form of the others."""
    if not isinstance(message, dict):
        raise PeftError(f"{place}: a message is {message!r}, not an object")
    if "from" in message and "value" in message:
        if message["from"] not in _SHAREGPT_ROLES:
            near = tree.nearest(str(message["from"]), _SHAREGPT_ROLES)
            raise PeftError(f"{place}: a message is from {message['from']!r}; closest: {near}")
        return {"role": _SHAREGPT_ROLES[message["from"]], "content": message["value"]}
    if not isinstance(message.get("role"), str):
        raise PeftError(
            f"{place}: a message has neither a role nor 'from' and 'value'; it has {list(message)}"
        )
    return message


def _tools(given: object, place: str) -> tuple[Mapping[str, Any], ...] | None:
    if not given:
        return None
    try:
        tools = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise PeftError(f"{place}: the tools are not JSON: {error}") from None
    if not isinstance(tools, list):
        raise PeftError(f"{place}: the tools are {str(given)[:40]!r}, not a list")
    return tuple(tools)
