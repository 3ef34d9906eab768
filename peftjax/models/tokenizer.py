"""A checkpoint's `tokenizer.json`, read with the `tokenizers` library (extra `peftjax[train]`)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftjax.errors import PeftError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
PAD_TOKENS = ("[PAD]", "<pad>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids.

    Attributes:
        backend: the tokenizer, its own truncation and padding switched off.
        pad_id: the id that fills a batch up.
    """

    backend: tokenizers.Tokenizer
    pad_id: int

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self.backend.get_vocab_size()

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


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load `tokenizer.json`.

    Args:
        path: the checkpoint folder, or the file.

    Raises:
        PeftError: when the file is absent or not a tokenizer, or names no padding token.
    """
    import tokenizers

    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise PeftError(f"no tokenizer at {file}; the checkpoint folder needs its {TOKENIZER_FILE}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises a bare Exception for every bad file.
        raise PeftError(f"{file} is not a tokenizer: {error}") from error
    pad_id = _pad_id(backend, file)
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, pad_id)


def _pad_id(backend: tokenizers.Tokenizer, file: Path) -> int:
    """The padding id by `tokenizer.json`, `tokenizer_config.json`, or the usual token names."""
    if backend.padding is not None:
        return backend.padding["pad_id"]
    names = PAD_TOKENS
    settings = file.with_name("tokenizer_config.json")
    if settings.is_file():
        token = json.loads(settings.read_text(encoding="utf-8")).get("pad_token")
        if token is not None:
            names = (token["content"] if isinstance(token, dict) else token,)
    for name in names:
        if (pad_id := backend.token_to_id(name)) is not None:
            return pad_id
    raise PeftError(f"{file} has no padding token ({', '.join(names)}); name one in {settings}")
