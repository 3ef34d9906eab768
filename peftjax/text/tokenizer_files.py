"""What the files beside `tokenizer.json` say about it, each with its schema, and which of them wins.

The rules are those of transformers 5: `added_tokens_decoder` of `tokenizer_config.json` replaces both older
files; without it `special_tokens_map.json` goes before `tokenizer_config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from peftjax.core.errors import PeftError
from peftjax.io.files import checked, read_as, read_json, require_file

SETTINGS_FILE = "tokenizer_config.json"
OLD_SETTINGS_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT_TEMPLATE = "default"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
IdText = Annotated[str, msgspec.Meta(pattern="^[0-9]{1,9}$")]


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that is found in a text before the text is split; the flags are those of `tokenizers`."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    special: bool | None = None


Token = str | Added
Tokens = list[Token] | dict[str, Token]


@dataclasses.dataclass(frozen=True)
class NamedTemplate:
    """A chat template in a list of them."""

    name: str
    template: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is read of `tokenizer_config.json`, beside the special tokens."""

    tokenizer_class: str | None = None
    added_tokens_decoder: dict[IdText, Added] | None = None
    extra_special_tokens: Tokens | None = None
    additional_special_tokens: Tokens | None = None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None
    do_lower_case: bool | None = True
    tokenize_chinese_chars: bool | None = True
    strip_accents: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = False


@dataclasses.dataclass(frozen=True)
class OldSettings:
    """What is read of `special_tokens_map.json`, beside the special tokens."""

    extra_special_tokens: Tokens | None = None
    additional_special_tokens: Tokens | None = None


@dataclasses.dataclass(frozen=True)
class _TextConfig:
    eos_token_id: Id | list[Id] | None = None


@dataclasses.dataclass(frozen=True)
class _Config:
    model_type: str | None = None
    tokenizer_class: str | None = None
    eos_token_id: Id | list[Id] | None = None
    text_config: _TextConfig | None = None


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the files say together.

    Attributes:
        settings: of `tokenizer_config.json`.
        named: the special tokens by name, the model's own names (`image_token`) among them.
        extra: further special tokens.
        added: the tokens to add, by the id that a file gives them.
        chat_templates: the sources of the chat templates by name.
        model_type: what `config.json` says about the model.
        tokenizer_class: the class in transformers that a file names, without "Fast".
        stop_ids: those of `generation_config.json`, or else of `config.json`.
    """

    settings: Settings
    named: Mapping[str, Added]
    extra: tuple[Added, ...]
    added: Mapping[int, Added]
    chat_templates: Mapping[str, str]
    model_type: str
    tokenizer_class: str
    stop_ids: tuple[int, ...]


def read_declared(folder: Path, config: Mapping[str, Any] | None = None) -> Declared:
    """Read the files of a folder, those that exist; `config` is the content of its `config.json`, if known.

    Raises:
        PeftError: when one is not what its schema says.
    """
    values = _optional(folder / SETTINGS_FILE)
    settings = checked(Settings, values, folder / SETTINGS_FILE)
    named = _named(values, folder / SETTINGS_FILE)
    extra = settings.extra_special_tokens or settings.additional_special_tokens
    added = {int(id): token for id, token in (settings.added_tokens_decoder or {}).items()}
    if settings.added_tokens_decoder is None:
        file = folder / OLD_SETTINGS_FILE
        older = _optional(file)
        more = checked(OldSettings, older, file)
        named |= _named(older, file)
        named = {role: token for role, token in named.items() if role not in older or older[role] is not None}
        if isinstance(more.extra_special_tokens, list) and not isinstance(extra, dict):
            extra = [*(extra or []), *more.extra_special_tokens]
        else:
            extra = more.extra_special_tokens or extra
        extra = more.additional_special_tokens if extra is None else extra
    names = extra if isinstance(extra, dict) else {}
    named |= {role: _special(token) for role, token in names.items()}
    extras = tuple(map(_special, extra if isinstance(extra, list) else []))
    if settings.added_tokens_decoder is None:
        special = {token.content for token in (*named.values(), *extras)}
        for content, id in checked(
            dict[str, Id], _optional(folder / ADDED_FILE), folder / ADDED_FILE
        ).items():
            added[id] = Added(content, normalized=content not in special, special=content in special)
    content = _optional(folder / CONFIG_FILE) if config is None else config
    model = checked(_Config, content, folder / CONFIG_FILE)
    return Declared(
        settings,
        named,
        extras,
        added,
        _chat_templates(settings.chat_template, folder),
        model.model_type or "",
        (settings.tokenizer_class or model.tokenizer_class or "").removesuffix("Fast"),
        _stop_ids(model, folder / GENERATION_FILE),
    )


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _special(token: Token) -> Added:
    if isinstance(token, str):
        return Added(token, special=True)
    return dataclasses.replace(token, special=True)


def _named(values: Mapping[str, Any], file: Path) -> dict[str, Added]:
    """The special tokens by name: the usual roles, and what else ends in `_token` and is a token."""
    found = {
        key: checked(Token | None, value, f"{file}: {key!r}")
        for key, value in values.items()
        if key in ROLES or (key.endswith("_token") and _looks_like_token(value))
    }
    return {role: _special(token) for role, token in found.items() if token is not None}


def _looks_like_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _stop_ids(config: _Config, file: Path) -> tuple[int, ...]:
    if file.is_file():
        found = read_as(_TextConfig, file).eos_token_id
    else:
        found = config.eos_token_id
        if found is None and config.text_config is not None:
            found = config.text_config.eos_token_id
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)


def _chat_templates(given: str | list[NamedTemplate] | dict[str, str] | None, folder: Path) -> dict[str, str]:
    """The chat templates by name; files of their own replace those of the settings."""
    files = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files[DEFAULT_TEMPLATE] = folder / TEMPLATE_FILE
    if files:
        return {name: _text(file) for name, file in files.items()}
    if isinstance(given, str):
        return {DEFAULT_TEMPLATE: given}
    if isinstance(given, list):
        return {entry.name: entry.template for entry in given}
    return dict(given or {})


def _text(file: Path) -> str:
    require_file(file)
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise PeftError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PeftError(f"{file} is not text in UTF-8: {error}") from error
