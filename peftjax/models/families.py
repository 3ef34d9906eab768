"""The supported families by their `model_type`, and which one a checkpoint is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.io.files import checked, read_json
from peftjax.models.bert import BERT
from peftjax.models.family import Family
from peftjax.models.gemma import GEMMA, GEMMA2, GEMMA3
from peftjax.models.gpt2 import GPT2
from peftjax.models.gpt_oss import GPT_OSS
from peftjax.models.llama import LLAMA
from peftjax.models.mistral import MISTRAL
from peftjax.models.mixtral import MIXTRAL
from peftjax.models.opt import OPT
from peftjax.models.qwen2 import QWEN2
from peftjax.models.qwen3 import QWEN3
from peftjax.models.qwen3_moe import QWEN3_MOE
from peftjax.models.roberta import ROBERTA, XLM_ROBERTA
from peftjax.models.schemas import of_family
from peftjax.models.t5 import MT5, T5
from peftjax.models.vit import VIT

CONFIG_FILE = "config.json"
_ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, VIT)
_DECODERS = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA, GEMMA2, GEMMA3, GPT2, GPT_OSS, OPT)
_ENCODER_DECODERS = (T5, MT5)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_ENCODERS, *_DECODERS, *_ENCODER_DECODERS)}


def read_family(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a checkpoint, and the content of its `config.json`.

    Raises:
        PeftError: the file cannot be read, is of no supported family, or has a setting of another type or
            out of range.
    """
    file = folder / CONFIG_FILE
    values = read_json(file)
    return family_of(values, file), values


def family_of(values: Mapping[str, Any], where: object) -> Family:
    """The family of the content of a `config.json`, which was read from `where`.

    Raises:
        PeftError: it is of no supported family, or has a setting of another type or out of range.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        text = f"{name}_text"
        hint = f"; the language model alone, {text}, is" if text in FAMILIES else ""
        raise PeftError(f"{where} has model_type {name!r}; supported: {', '.join(FAMILIES)}{hint}")
    checked(of_family(name), values, where)
    return FAMILIES[name]
