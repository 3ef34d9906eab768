"""A checkpoint's `tokenizer.json`, read with the `tokenizers` library (extra `peftjax[train]`)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftjax.core.errors import PeftError
from peftjax.text.tokenizer_class import class_of, default_tokens, frame, rebuild
from peftjax.text.tokenizer_files import (
    DEFAULT_TEMPLATE,
    OLD_SETTINGS_FILE,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    Added,
    Declared,
    read_declared,
)

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
PAD_TOKENS = ("[PAD]", "<pad>")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: the tokenizer, its own truncation and padding switched off.
        pad_id: the id that fills a batch up.
        bos_id: the id that begins a text, if the checkpoint names one.
        eos_id: the id that ends a text, if the checkpoint names one.
        stop_ids: every id that ends generation: `eos_id`, and those of `generation_config.json` or else of
            `config.json`.
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
        with _named_failures("the tokenizer cannot encode the text"):
            for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False):
                encoding.truncate(room)
                rows.append(self.backend.post_process(encoding).ids)
        return rows

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, uncut; special tokens only where the text itself spells them."""
        with _named_failures("the tokenizer cannot encode the text"):
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids."""
        with _named_failures("the tokenizer cannot decode the ids"):
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


def load_tokenizer(
    path: str | os.PathLike[str], *, decoder: bool = False, config: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Load `tokenizer.json` and what the files beside it say about it, as transformers' `AutoTokenizer` does.

    Args:
        path: the checkpoint folder, or the file.
        decoder: for a language model: pad with eos where no padding token is named.
        config: the content of the folder's `config.json`, where the caller has read it already.

    Raises:
        PeftError: when a file is absent or malformed, a token it names is not in the vocabulary, or
            no padding token is named (for a decoder: neither that nor eos).
    """
    import tokenizers

    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise PeftError(f"no tokenizer at {file}; the checkpoint folder needs its {TOKENIZER_FILE}")
    declared = read_declared(file.parent, config)
    with _named_failures(f"{file} is not a tokenizer"):
        backend = tokenizers.Tokenizer.from_file(str(file))
        padding = backend.padding
        backend.no_truncation()
        backend.no_padding()
    name = class_of(declared, backend)
    named = {**default_tokens(name, backend), **declared.named}
    if padding is not None and "pad_token" not in named:
        named["pad_token"] = Added(padding["pad_token"], special=True)
    _check_named(backend, named, declared, file, ("bos_token", "eos_token") if decoder else ())
    with _named_failures(f"{file} and the files beside it make no tokenizer"):
        rebuild(backend, name, declared.settings, named)
        _add_tokens(backend, named, declared, file)
        frame(backend, name, named)
    bos_id, eos_id = (
        backend.token_to_id(named[role].content) if role in named else None
        for role in ("bos_token", "eos_token")
    )
    own = () if eos_id is None else (eos_id,)
    return Tokenizer(
        backend,
        _pad_id(backend, named, file, fallback=eos_id if decoder else None),
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=tuple(dict.fromkeys([*own, *declared.stop_ids])),
        prefix_ids=_prefix_ids(backend, file),
        special_tokens={role: token.content for role, token in named.items()},
        chat_templates=declared.chat_templates,
    )


@contextlib.contextmanager
def _named_failures(what: str) -> Iterator[None]:
    """Raise a PeftError for what the `tokenizers` library raises: a bare Exception, or a panic in Rust."""
    try:
        yield
    except (PeftError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # A panic is a BaseException and no Exception.
        raise PeftError(f"{what}: {error}") from error


def _check_named(
    backend: tokenizers.Tokenizer,
    named: Mapping[str, Added],
    declared: Declared,
    file: Path,
    needed: Sequence[str],
) -> None:
    """Refuse a token that is needed and that no file gives an id, though one would be made up for it."""
    added = {token.content for token in declared.added.values()}
    for role in (*needed, "pad_token"):
        text = named[role].content if role in named else None
        if text is None or text in added or backend.token_to_id(text) is not None:
            continue
        if role == "pad_token":
            raise _no_padding(file, (text,))
        files = " or ".join((SETTINGS_FILE, OLD_SETTINGS_FILE))
        raise PeftError(f"{file} does not have the {role} {text!r} that {files} names")


def _add_tokens(
    backend: tokenizers.Tokenizer, named: Mapping[str, Added], declared: Declared, file: Path
) -> None:
    """Add the tokens that stand only beside `tokenizer.json`, in the order that gives them their ids.

    Raises:
        PeftError: when a token would have another id than the file that adds it says.
    """
    present = backend.get_added_tokens_decoder()
    names, seen = {token.content for token in named.values()}, {repr(token) for token in present.values()}
    known = {token.content for token in present.values()} | {
        token.content for token in declared.added.values()
    }
    old = {id: backend.token_to_id(token.content) for id, token in declared.added.items()}
    new = []
    for _, token in sorted(declared.added.items()):
        if repr(_backend_token(token)) not in seen:
            new.append(_backend_token(token, special=token.special or token.content in names))
    # A named token keeps the flags that the files give it as an added one.
    for token in (*named.values(), *declared.extra):
        if token.content and token.content not in known:
            known.add(token.content)
            new.append(_backend_token(token))
    backend.add_tokens(new)
    for id, token in declared.added.items():
        found = backend.token_to_id(token.content)
        if found == id:
            continue
        if old[id] is None:
            raise PeftError(
                f"a file beside {file} gives the token {token.content!r} the id {id}, but the next free one "
                f"is {found}; save the tokenizer again, with the token in {TOKENIZER_FILE}"
            )
        logger.warning(
            "%r has the id %d in %s, not %d as in a file beside it", token.content, found, file, id
        )


def _backend_token(token: Added, special: bool | None = None) -> tokenizers.AddedToken:
    import tokenizers

    flags = {key: value for key, value in dataclasses.asdict(token).items() if value is not None}
    made = tokenizers.AddedToken(**flags)
    if special:
        made.special = True
    return made


def _pad_id(
    backend: tokenizers.Tokenizer, named: Mapping[str, Added], file: Path, *, fallback: int | None
) -> int:
    """The padding id by the token that is named, the usual names, or `fallback`."""
    names = (named["pad_token"].content,) if "pad_token" in named else PAD_TOKENS
    for name in names:
        if (pad_id := backend.token_to_id(name)) is not None:
            return pad_id
    if fallback is not None and "pad_token" not in named:
        return fallback
    raise _no_padding(file, names)


def _no_padding(file: Path, names: Sequence[str]) -> PeftError:
    return PeftError(
        f"{file} has no padding token ({', '.join(names)}); name one in {file.with_name(SETTINGS_FILE)}"
    )


def _prefix_ids(backend: tokenizers.Tokenizer, file: Path) -> tuple[int, ...]:
    """The special tokens that the post-processor puts in front of a text.

    They are found with a vocabulary of one word, because this tokenizer may make nothing of a given letter.
    Like transformers 5, nothing here reads `add_bos_token`: it is for tokenizers without this file.
    """
    import tokenizers

    if backend.post_processor is None:
        return ()
    with _named_failures(f"the post_processor of {file} does not work"):
        probe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        probe.post_processor = backend.post_processor
        encoding = probe.encode("a")
        words = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    if not words:
        raise PeftError(f"the post_processor of {file} leaves the text out")
    return tuple(encoding.ids[: words[0]])
