"""What a tokenizer class of transformers does by itself, whatever `tokenizer.json` says.

transformers 5 builds some classes anew from the vocabulary, so their settings in `tokenizer_config.json`
(`do_lower_case`, `add_prefix_space`, `legacy`) win over the normalizer and splitting in `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftjax.core.errors import PeftError
from peftjax.text.tokenizer_files import Added, Declared, Settings

if TYPE_CHECKING:
    import tokenizers

_BERT, _ROBERTA, _GPT2, _QWEN2 = "BertTokenizer", "RobertaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"
_LLAMA, _GEMMA, _T5, _XLM = "LlamaTokenizer", "GemmaTokenizer", "T5Tokenizer", "XLMRobertaTokenizer"
_PLAIN = "TokenizersBackend"
_OF_MODEL = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _XLM,
    "gpt2": _GPT2,
    "opt": _GPT2,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2,
    "qwen3_moe": _QWEN2,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "t5": _T5,
    "mt5": _T5,
    "mistral": _PLAIN,
    "mixtral": _PLAIN,
}
# Models whose files on the hub name a wrong class, by transformers' own list.
_MISNAMED = {"qwen2"}

_SENTENCES = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"}
_SENTENCES |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
_DEFAULTS = {
    _BERT: {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    _ROBERTA: _SENTENCES,
    _XLM: _SENTENCES,
    _GPT2: dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    _QWEN2: dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    _LLAMA: {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    _GEMMA: {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    _T5: {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}


def class_of(declared: Declared, backend: tokenizers.Tokenizer) -> str:
    """The name of the class that transformers' `AutoTokenizer` takes, without "Fast"."""
    named, usual = declared.tokenizer_class, _OF_MODEL.get(declared.model_type, "")
    if named == _LLAMA and _is_byte_level(backend) and declared.model_type not in _MISNAMED:
        return _PLAIN
    if not named:
        return usual or _PLAIN
    if usual and named != usual:
        if usual == _PLAIN:
            return _PLAIN
        return usual if declared.model_type in _MISNAMED else named
    return named


def default_tokens(name: str, backend: tokenizers.Tokenizer) -> dict[str, Added]:
    """The special tokens that a class names by itself.

    Of those that the vocabulary lacks only an encoder's are kept, which are then added as in transformers: a
    made-up id would end no text.
    """
    return {
        role: Added(text, special=True)
        for role, text in _DEFAULTS.get(name, {}).items()
        if role in ("sep_token", "cls_token", "mask_token") or backend.token_to_id(text) is not None
    }


def rebuild(backend: tokenizers.Tokenizer, name: str, settings: Settings, named: Mapping[str, Added]) -> None:
    """Give the tokenizer the normalizer and the splitting that the class builds from its settings."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    if name == _BERT and isinstance(backend.model, models.WordPiece):
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=settings.tokenize_chinese_chars is not False,
            strip_accents=settings.strip_accents,
            lowercase=settings.do_lower_case is not False,
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        backend.model.unk_token = named["unk_token"].content if "unk_token" in named else "[UNK]"
    elif name == _LLAMA and isinstance(backend.model, models.BPE):
        prefix = settings.add_prefix_space is not False
        scheme = ("always" if settings.legacy else "first") if prefix else "never"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        end = [decoders.Strip(content=" ", left=1)] if prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
        )
        backend.model.fuse_unk = backend.model.byte_fallback = True
        backend.model.unk_token = None
    elif name in (_GPT2, _ROBERTA) and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.add_prefix_space or False)


def frame(backend: tokenizers.Tokenizer, name: str, named: Mapping[str, Added]) -> None:
    """Give a text the special tokens around it that the class puts there.

    Raises:
        PeftError: when the vocabulary lacks one of them.
    """
    from tokenizers import models, processors

    if (name == _BERT and isinstance(backend.model, models.WordPiece)) or (
        name == _ROBERTA and isinstance(backend.model, models.BPE)
    ):
        ends = []
        for role in ("cls_token", "sep_token"):
            text = named[role].content if role in named else _DEFAULTS[name][role]
            if (id := backend.token_to_id(text)) is None:
                raise PeftError(f"the vocabulary lacks the {role} {text!r} that {name} puts around a text")
            ends.append((text, id))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{ends[0][0]}:0 $A:0 {ends[1][0]}:0", special_tokens=list(dict.fromkeys(ends))
        )


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    parts = (backend.pre_tokenizer, backend.decoder)
    return any(part is not None and b'"ByteLevel"' in part.__getstate__() for part in parts)
