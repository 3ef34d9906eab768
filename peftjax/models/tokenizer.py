"""A checkpoint's `tokenizer.json`, read with the `tokenizers` library (extra `peftjax[train]`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftjax.errors import PeftError
from peftjax.io.files import read_json

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
OLD_SETTINGS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
PAD_TOKENS = ("[PAD]", "<pad>")
DEFAULT_TEMPLATE = "default"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: the tokenizer, its own truncation and padding switched off.
        pad_id: the id that fills a batch up.
        bos_id: the id that begins a text, if the checkpoint names one.
        eos_id: the id that ends a text, if the checkpoint names one.
        stop_ids: every id that ends generation: `eos_id`, and those of `generation_config.json`.
        prefix_ids: the special tokens in front of a text; a decoder's are bos, or none.
        special_tokens: the named special tokens, such as `bos_token`, as a chat template sees them.
        chat_templates: the sources of the checkpoint's chat templates by name.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self.backend.get_vocab_size()

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """The ids of each text, at most `max_length` with the special tokens, which are kept.

        Raises:
            PeftError: when `max_length` leaves no room beside the special tokens.
        """
        room = max_length - self.backend.num_special_tokens_to_add(is_pair=False)
        if room < 1:
            raise PeftError(f"max_length {max_length} leaves no room beside the special tokens")
        rows = []
        for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False):
            encoding.truncate(room)
            rows.append(self.backend.post_process(encoding).ids)
        return rows

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, uncut; special tokens only where the text itself spells them."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat_template(self, name: str = DEFAULT_TEMPLATE) -> str:
        """The source of the chat template called `name`.

        Raises:
            PeftError: when the checkpoint has no such template.
        """
        if not self.chat_templates:
            raise PeftError(
                f"the tokenizer has no chat template: use an instruction-tuned checkpoint, or put a "
                f"{TEMPLATE_FILE} beside its {TOKENIZER_FILE}"
            )
        if name not in self.chat_templates:
            known = ", ".join(map(repr, self.chat_templates))
            raise PeftError(f"the tokenizer has no chat template {name!r}; it has {known}")
        return self.chat_templates[name]


def load_tokenizer(path: str | os.PathLike[str], *, decoder: bool = False) -> Tokenizer:
    """Load `tokenizer.json` and what the files beside it say about it.

    Args:
        path: the checkpoint folder, or the file.
        decoder: for a language model: pad with eos where no padding token is named.

    Raises:
        PeftError: when a file is absent or malformed, a token it names is not in the vocabulary, or
            no padding token is named (for a decoder: neither that nor eos).
    """
    import tokenizers

    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise PeftError(f"no tokenizer at {file}; the checkpoint folder needs its {TOKENIZER_FILE}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises a bare Exception for every bad file.
        raise PeftError(f"{file} is not a tokenizer: {error}") from error
    settings = _optional_json(file.with_name(SETTINGS_FILE))
    named = _special_tokens({**_optional_json(file.with_name(OLD_SETTINGS_FILE)), **settings})
    bos_id, eos_id = (
        _named_id(backend, named, role, file) if decoder else backend.token_to_id(named.get(role, ""))
        for role in ("bos_token", "eos_token")
    )
    pad_id = _pad_id(backend, named, file, fallback=eos_id if decoder else None)
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(
        backend,
        pad_id,
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=_stop_ids(eos_id, file.with_name(GENERATION_FILE)),
        prefix_ids=_prefix_ids(backend),
        special_tokens=named,
        chat_templates=_chat_templates(settings.get("chat_template"), file),
    )


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text of each special token that the settings name, as a string or an object with `content`."""
    tokens = {role: settings[role] for role in _ROLES if settings.get(role) is not None}
    return {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items()}


def _named_id(backend: tokenizers.Tokenizer, named: Mapping[str, str], role: str, file: Path) -> int | None:
    if role not in named:
        return None
    found = backend.token_to_id(named[role])
    if found is None:
        raise PeftError(f"{file} does not have the {role} {named[role]!r} that {SETTINGS_FILE} names")
    return found


def _pad_id(
    backend: tokenizers.Tokenizer, named: Mapping[str, str], file: Path, *, fallback: int | None
) -> int:
    """The padding id by `tokenizer.json`, `tokenizer_config.json`, the usual token names, or `fallback`."""
    if backend.padding is not None:
        return backend.padding["pad_id"]
    names = (named["pad_token"],) if "pad_token" in named else PAD_TOKENS
    for name in names:
        if (pad_id := backend.token_to_id(name)) is not None:
            return pad_id
    if fallback is not None and "pad_token" not in named:
        return fallback
    raise PeftError(
        f"{file} has no padding token ({', '.join(names)}); name one in {file.with_name(SETTINGS_FILE)}"
    )


def _stop_ids(eos_id: int | None, file: Path) -> tuple[int, ...]:
    """The tokenizer's eos and those of `generation_config.json`, each once."""
    found = _optional_json(file).get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(id, int) for id in ids):
        raise PeftError(f"{file}: eos_token_id is {found!r}, not an integer or a list of integers")
    return tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *ids]))


def _prefix_ids(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The special tokens that the post-processor puts in front of a text.

    Like transformers 5, nothing here reads `add_bos_token`: it is for tokenizers without this file.
    """
    encoding = backend.post_process(backend.encode("a", add_special_tokens=False))
    words = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return tuple(encoding.ids[: words[0]]) if words else ()


def _chat_templates(given: Any, file: Path) -> dict[str, str]:
    """The chat templates by name; `chat_template.jinja` is the default one where it exists."""
    templates = given if isinstance(given, list) else []
    if isinstance(given, str):
        templates = [{"name": DEFAULT_TEMPLATE, "template": given}]
    try:
        found = {template["name"]: template["template"] for template in templates}
    except (TypeError, KeyError):
        raise PeftError(
            f"{file.with_name(SETTINGS_FILE)}: a chat_template in the list lacks its name or template"
        ) from None
    source = file.with_name(TEMPLATE_FILE)
    if source.is_file():
        found[DEFAULT_TEMPLATE] = source.read_text(encoding="utf-8")
    return found
