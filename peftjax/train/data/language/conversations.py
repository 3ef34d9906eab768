"""Chats from JSONL or Parquet files, with the parts that the assistant says."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.io.files import parse_json
from peftjax.text.chat import ChatTemplate, render, render_marked
from peftjax.text.tokenizer import Tokenizer
from peftjax.train.data.columns import pick_column, shown, warn_of_unused
from peftjax.train.data.files import DataFile, data_file
from peftjax.train.data.language.example import Example, encode_pieces, make_example
from peftjax.train.data.language.prompts import COMPLETION_GUESSES, PROMPT_GUESSES, optional_text

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
TOOLS_COLUMN = "tools"
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython", "environment")
ROLES += ("document", "documents", "context")
"""What templates of released models know; a role beyond them is taken for a misspelt one."""
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": ASSISTANT,
}
_CALL = "function_call"
"""ShareGPT's word for an assistant that calls tools: `{"name": ..., "arguments": ...}`, or a list of them."""

_LEARNING = ("weight", "train")
"""Of a message: OpenAI's and axolotl's words for whether it is learnt."""


@dataclass(frozen=True)
class Conversation:
    """One chat, and where it stands (for errors)."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    place: str
    learnt: tuple[bool, ...] | None = None
    """Whether each message is to be learnt where it is the assistant's; by default all are."""

    @property
    def group(self) -> str:
        """What decides on which side of the split the chat is: all before the first answer."""
        roles = [message["role"] for message in self.messages]
        asked = self.messages[: roles.index(ASSISTANT)] if ASSISTANT in roles else ()
        return json.dumps(asked or self.messages, sort_keys=True, default=str)


def holds_messages(value: object) -> bool:
    """Whether a value looks like a list of messages, or its JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return False
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)
    )


def read_conversations(
    file: Path | DataFile,
    *,
    messages_column: str | None = None,
    completion_column: str | None = None,
    answered: bool = True,
) -> list[Conversation]:
    """The chats of a file: a list of messages, or its JSON, in each row.

    A message is {role, content} or ShareGPT's {from, value}, where `function_call` is the assistant's.
    Without a column of messages, those of a prompt and of a completion are one chat, of which only the
    completion is learnt. A column `tools` (a list of JSON schemas, or its JSON) goes to the chat template,
    and a string in a column `system` becomes the first message. Of a message, `weight: 0` and `train: false`
    say that it is not to be learnt. Columns of no use are named in the log.

    Args:
        file: its name, or the open file.
        messages_column: with the messages, or with those of the prompt; guessed from the usual names.
        completion_column: with the messages of the completion, where they stand apart.
        answered: whether to read those.

    Raises:
        PeftError: for a file that cannot be read, an unknown role, or a message of another form.
    """
    file = data_file(file)
    path, rows, names = file.path, file.rows, file.columns
    guesses = (*MESSAGE_COLUMNS, *PROMPT_GUESSES)
    column = pick_column(names, messages_column, guesses, "messages", str(path))
    columns = [column]
    if completion_column is not None or column in PROMPT_GUESSES:
        written = [name for name in COMPLETION_GUESSES if name in names]
        if completion_column is not None:
            written = [pick_column(names, completion_column, (), "completion", str(path))]
        columns += written[:1] if answered else []
    unread = () if answered else COMPLETION_GUESSES
    warn_of_unused(path, names, (*columns, *unread, "system", TOOLS_COLUMN))
    found = []
    for line, row in rows:
        place = f"{path}, line {line}"
        messages, learnt = [], []
        for number, name in enumerate(columns):
            for message in _messages(row, name, place):
                counts = _is_learnt(message, place)
                messages.append(_message(message, place))
                learnt.append(counts and number == len(columns) - 1)
        if system := optional_text(row, "system", place):
            messages.insert(0, {"role": "system", "content": system})
            learnt.insert(0, False)
        tools = read_tools(row.get(TOOLS_COLUMN), place)
        found.append(Conversation(tuple(messages), tools, place, tuple(learnt)))
    return found


def tokenize_conversations(
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
            spans = _learnt_spans(chat, spans)
        else:
            text, spans = _turns(chat, template)
    except PeftError as error:
        raise PeftError(f"{chat.place}: {error}") from error
    cuts = [0, *(cut for span in spans for cut in span), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


def _learnt_spans(chat: Conversation, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts that the assistant generates, without those of messages that are not to be learnt."""
    roles = [message["role"] for message in chat.messages]
    learnt = [one for one, role in zip(chat.learnt or [True] * len(roles), roles) if role == ASSISTANT]
    if all(learnt):
        return spans
    if len(spans) != len(learnt):
        raise PeftError(
            f"the chat template marks {len(spans)} parts as the assistant's, which has {len(learnt)} "
            "messages: it cannot be told which of them are not to be learnt"
        )
    return [span for span, one in zip(spans, learnt) if one]


def _turns(chat: Conversation, template: ChatTemplate) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where each assistant turn begins and ends in it, by rendering prefixes."""

    def text_of(count: int, *, prompt: bool = False) -> str:
        messages = chat.messages[:count]
        return render(template, messages, add_generation_prompt=prompt, tools=chat.tools)

    whole = text_of(len(chat.messages))
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] != ASSISTANT or not (chat.learnt is None or chat.learnt[i]):
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


def _messages(row: Mapping[str, object], column: str, place: str) -> list[dict[str, Any]]:
    """The messages in a column, which may be JSON."""
    given = row.get(column)
    if isinstance(given, str) and given.lstrip().startswith(("[", "{")):
        try:
            given = parse_json(given)
        except ValueError as error:
            raise PeftError(f"{place}: the {column} are not JSON: {error}") from error
    if isinstance(given, dict):  # A single message, as a completion may be.
        given = [given]
    if not isinstance(given, list) or not given:
        raise PeftError(f"{place}: {column} is {shown(given)}, not a list of messages")
    for message in given:
        if not isinstance(message, dict):
            raise PeftError(f"{place}: a message is {shown(message)}, not an object")
    return given


def _is_learnt(message: Mapping[str, Any], place: str) -> bool:
    """Whether the message may be learnt, by its `weight` (0 or 1) and `train` (a boolean)."""
    weight, train = (message.get(name) for name in _LEARNING)
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise PeftError(f"{place}: the weight of a message is {shown(weight)}; it can be 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise PeftError(f"{place}: the train of a message is {shown(train)}; it can be true or false")
    return weight != 0 and train is not False


def _message(message: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """A message checked, ShareGPT's in the form of the others."""
    rest = {name: value for name, value in message.items() if name not in _LEARNING}
    if rest.get("role") is None and rest.get("from") is not None:
        role, known = rest.pop("from"), dict(_SHAREGPT_ROLES)
        if role == _CALL and (calls := _calls(rest.get("value", rest.get("content")))):
            rest = {**rest, "content": "", "tool_calls": calls}
            rest.pop("value", None)
        what = f"is from {shown(role)}"
    else:
        role, known = rest.pop("role", None), {name: name for name in ROLES}
        what = f"has the role {shown(role)}"
    if role is None:
        raise PeftError(
            f"{place}: a message has neither a role nor 'from' and 'value'; it has {list(message)}"
        )
    if not isinstance(role, str) or role not in known:
        near = tree.nearest(str(role), known)
        raise PeftError(f"{place}: a message {what}; closest: {near}")
    if rest.get("content") is None and "value" in rest:
        rest["content"] = rest.pop("value")
    content = rest.get("content")
    if content is not None and not isinstance(content, str | list):
        raise PeftError(f"{place}: the content of a message is {shown(content)}, not a string")
    return {"role": known[role], **rest}


def _calls(said: object) -> list[dict[str, Any]]:
    """The calls of tools that a message holds, as chat templates take them; none where it has other text."""
    try:
        calls = parse_json(said) if isinstance(said, str) else said
    except ValueError:
        return []
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return []
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in calls
    ]


def read_tools(given: object, place: str) -> tuple[Mapping[str, Any], ...] | None:
    """The JSON schemas of a row's tools, given as a list or as its JSON.

    Raises:
        PeftError: it is neither.
    """
    if not given:
        return None
    try:
        tools = parse_json(given) if isinstance(given, str) else given
    except ValueError as error:
        raise PeftError(f"{place}: the tools are not JSON: {error}") from None
    if not isinstance(tools, list):
        raise PeftError(f"{place}: the tools are {shown(given)}, not a list")
    for tool in tools:
        if not isinstance(tool, dict):
            raise PeftError(f"{place}: a tool is {shown(tool)}, not an object")
    return tuple(tools)
