"""Tokenizers that several files describe, against transformers' AutoTokenizer: the same ids."""

import json

import pytest

from peftjax.core.errors import PeftError
from peftjax.text.tokenizer import load_tokenizer

pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in peftjax[train]")
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

pytestmark = pytest.mark.parity

TEXTS = (
    "hello world",
    " the quick <|new|>user<mask>  x",
    "<|new|> hello <s>the</s> dog",
    "Héllo WORLD 中文 naïve",
    "[MASK] [CLS] hello [PAD]",
    "<image> <pad>the",
    "",
)
LINES = ["the quick brown fox jumps over the lazy dog. hello world user assistant system\n"] * 3
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
NEW = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
STRIP = {"content": "<|new|>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
MASK = {"mask_token": {"content": "<mask>", "lstrip": True, "__type": "AddedToken"}}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def byte_level(post=None):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<unk>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    if post:
        backend.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return backend


def sentence_pieces():
    """The form in which Llama 2 is released: its spaces come from the normalizer."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def word_pieces(lowercase=True):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"helowrdHéaïnv中文", "##e", "##l", "##o", "hello"]
    words += ["world", "WORLD", "he", "##llo", "Hello", "hllo", "中文", "the", "Héllo"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return backend


def padded():
    backend = byte_level()
    backend.enable_padding(pad_id=3, pad_token="<pad>")
    return backend


def no_letter_a():
    """A tokenizer that makes nothing of the letter a."""
    backend = byte_level("<s> $A")
    backend.normalizer = normalizers.Replace("a", "")
    return backend


SETTINGS, OLD, ADDED, CONFIG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
GRID = {
    "added_tokens.json": (byte_level, {SETTINGS: NAMES, ADDED: {"<|new|>": 300}}),
    "added and special": (
        byte_level,
        {SETTINGS: NAMES, ADDED: {"<|new|>": 300}, OLD: {"additional_special_tokens": ["<|new|>"]}},
    ),
    "two added": (byte_level, {SETTINGS: NAMES, ADDED: {"<image>": 301, "<|new|>": 300}}),
    "added with a gap": (byte_level, {SETTINGS: NAMES, ADDED: {"<|new|>": 305}}),
    "decoder": (byte_level, {SETTINGS: {**NAMES, "added_tokens_decoder": {"300": NEW}}}),
    "decoder, not special": (
        byte_level,
        {SETTINGS: {**NAMES, "added_tokens_decoder": {"300": {**NEW, "special": False}}}},
    ),
    "decoder that strips": (byte_level, {SETTINGS: {**NAMES, "added_tokens_decoder": {"300": STRIP}}}),
    "decoder against tokenizer.json": (
        byte_level,
        {SETTINGS: {**NAMES, "added_tokens_decoder": {"2": {**NEW, "content": "</s>"}}}},
    ),
    "decoder makes older files void": (
        byte_level,
        {
            SETTINGS: {**NAMES, "added_tokens_decoder": {"300": NEW}},
            OLD: {"eos_token": "<pad>"},
            ADDED: {"<image>": 300},
        },
    ),
    "additional": (byte_level, {SETTINGS: {**NAMES, "additional_special_tokens": ["<|new|>"]}}),
    "extra": (byte_level, {SETTINGS: {**NAMES, "extra_special_tokens": ["<|new|>", "<image>"]}}),
    "extra and additional": (
        byte_level,
        {SETTINGS: {**NAMES, "extra_special_tokens": ["<image>"], "additional_special_tokens": ["<|new|>"]}},
    ),
    "extra by name": (byte_level, {SETTINGS: {**NAMES, "extra_special_tokens": {"image_token": "<image>"}}}),
    "a name of the model": (byte_level, {SETTINGS: {**NAMES, "image_token": "<image>"}}),
    "map: additional": (byte_level, {SETTINGS: NAMES, OLD: {"additional_special_tokens": ["<|new|>"]}}),
    "map: extra": (
        byte_level,
        {
            SETTINGS: {**NAMES, "extra_special_tokens": ["<image>"]},
            OLD: {"extra_special_tokens": ["<|new|>"]},
        },
    ),
    "map: mask": (byte_level, {SETTINGS: NAMES, OLD: {"mask_token": STRIP | {"content": "<mask>"}}}),
    "map against settings": (
        byte_level,
        {SETTINGS: NAMES, OLD: {"eos_token": "<pad>", "pad_token": "<unk>"}},
    ),
    "map says none": (byte_level, {SETTINGS: NAMES, OLD: {"unk_token": None}}),
    "only the map": (byte_level, {OLD: NAMES}),
    "mask strips": (byte_level, {SETTINGS: {**NAMES, **MASK}}),
    "padding in tokenizer.json": (padded, {SETTINGS: {k: NAMES[k] for k in ("bos_token", "eos_token")}}),
    "padding against settings": (padded, {SETTINGS: {**NAMES, "pad_token": "<unk>"}}),
    "bos": (lambda: byte_level("<s> $A"), {SETTINGS: NAMES}),
    "bos and eos": (lambda: byte_level("<s> $A </s>"), {SETTINGS: NAMES}),
    "bos twice": (lambda: byte_level("<s> <s> $A"), {SETTINGS: NAMES}),
    "eos": (lambda: byte_level("$A </s>"), {SETTINGS: NAMES}),
    "bos by the settings": (byte_level, {SETTINGS: {**NAMES, "add_bos_token": True, "add_eos_token": True}}),
    "no bos by the settings": (
        lambda: byte_level("<s> $A"),
        {SETTINGS: {**NAMES, "add_bos_token": False}},
    ),
    "no letter a": (no_letter_a, {SETTINGS: NAMES}),
    "GPT-2 with a space": (
        byte_level,
        {SETTINGS: {**NAMES, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
    ),
    "RoBERTa": (
        byte_level,
        {
            SETTINGS: {
                **NAMES,
                "tokenizer_class": "RobertaTokenizerFast",
                "cls_token": "<s>",
                "sep_token": "</s>",
            }
        },
    ),
    "Llama, byte level": (byte_level, {SETTINGS: {**NAMES, "tokenizer_class": "LlamaTokenizerFast"}}),
    "Llama 2": (sentence_pieces, {SETTINGS: {**NAMES, "tokenizer_class": "LlamaTokenizer"}}),
    "Llama 2 legacy": (
        sentence_pieces,
        {SETTINGS: {**NAMES, "tokenizer_class": "LlamaTokenizerFast", "legacy": True}},
    ),
    "Llama 2 without a space": (
        sentence_pieces,
        {SETTINGS: {**NAMES, "tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}},
    ),
    "Llama 2 by its file": (sentence_pieces, {SETTINGS: NAMES | PLAIN}),
    "Mistral": (
        sentence_pieces,
        {SETTINGS: {**NAMES, "tokenizer_class": "LlamaTokenizer"}, CONFIG: {"model_type": "mistral"}},
    ),
    "Qwen2": (
        byte_level,
        {
            SETTINGS: {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"},
            CONFIG: {"model_type": "llama"},
        },
    ),
    "BERT": (word_pieces, {SETTINGS: {"tokenizer_class": "BertTokenizer"}}),
    "BERT by its model": (word_pieces, {CONFIG: {"model_type": "bert"}}),
    "BERT, cased file and no setting": (
        lambda: word_pieces(False),
        {SETTINGS: {"tokenizer_class": "BertTokenizerFast"}},
    ),
    "BERT's tokenizer as it is": (lambda: word_pieces(False), {SETTINGS: {**PLAIN, "pad_token": "[PAD]"}}),
    **{
        f"BERT {more}": (word_pieces, {SETTINGS: {"tokenizer_class": "BertTokenizer", **more}})
        for more in (
            {"do_lower_case": False},
            {"do_lower_case": True, "strip_accents": False},
            {"do_lower_case": False, "strip_accents": True},
            {"tokenize_chinese_chars": False},
            {
                "do_lower_case": False,
                "tokenize_chinese_chars": False,
                "additional_special_tokens": ["<|new|>"],
            },
        )
    },
    "BERT, added": (
        word_pieces,
        {SETTINGS: {"tokenizer_class": "BertTokenizer"}, ADDED: {"<|new|>": len(word_pieces().get_vocab())}},
    ),
}
REFUSED = {"added with a gap"}
UNDECIDED = {"added and special"}
"""The special tokens of transformers have one more than those that its `skip_special_tokens` leaves out."""


@pytest.mark.parametrize("name", GRID)
def test_the_same_ids_and_special_tokens_or_an_error(tmp_path, name):
    make, files = GRID[name]
    make().save(str(tmp_path / "tokenizer.json"))
    for file, values in files.items():
        if file == SETTINGS and CONFIG not in files:
            values = {**PLAIN, **values}
        (tmp_path / file).write_text(json.dumps(values))
    decoder = "[PAD]" not in (tmp_path / "tokenizer.json").read_text()
    if name in REFUSED:
        with pytest.raises(PeftError, match="save the tokenizer again"):
            load_tokenizer(tmp_path, decoder=decoder)
        return
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, decoder=decoder)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.token_ids([text])[0] == expected, text
        if name not in UNDECIDED:
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)
        framed = theirs(text)["input_ids"]
        assert ours.encode([text], 512) == [framed], text
        assert list(ours.prefix_ids) == framed[: len(ours.prefix_ids)]
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert theirs.pad_token is None or ours.pad_id == theirs.pad_token_id
    assert set(theirs.all_special_ids) <= ours.special_ids
    assert ours.vocab_size == len(theirs)
