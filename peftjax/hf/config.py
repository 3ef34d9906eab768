"""`adapter_config.json` of a LoRA adapter: its fields, what they say of a module, and which are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.hf.common import CONFIG, CommonConfig, CommonFile, pattern_value, tupled
from peftjax.io.files import checked, read_json

# Every field that PEFT 0.21 writes, with its default.
FIELDS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Fields that every version of PEFT knows; of the others those are written that differ from their default,
# since a version refuses fields that are newer than itself.
OF_ALL_VERSIONS = (
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)
# Fields that, when set, change what the tensors mean or which there are, in a way nothing here stands for.
REFUSED = {
    "arrow_config": "a router has nothing trained; read the adapters that it is over, and give them to "
    "pj.adapters.arrow",
    "megatron_config": "its tensors are those of Megatron's layers; save it from an unsharded model",
    "use_qalora": "PEFT has it on GPTQ bases alone, which peftjax reads none of; train pj.qa_lora",
}
# Initializations that leave the base as it is; the others replace it by a residual.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


_Rank = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Alpha = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
_Token = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


@dataclass(frozen=True, kw_only=True)
class _File(CommonFile):
    """The fields of `adapter_config.json` that say something of the tensors; null is a field's default."""

    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    rank_pattern: dict[str, _Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, _Alpha] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[_Token] | dict[str, list[_Token]] | None = None


@dataclass(frozen=True, kw_only=True)
class LoraConfig(CommonConfig):
    """What `adapter_config.json` says, checked."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    dropout: float
    lora_bias: bool
    tokens: Mapping[str, tuple[int, ...]]
    """Rows that are trained by themselves, by the end of their table's module; '' is the input embedding."""

    parameters: tuple[str, ...] = ()
    """Parameters that have factors of their own, by the end of their name."""

    def by_parameter(self, module: str) -> bool:
        """Whether the factors of a module are those of its weight as a parameter, `weight + scale · B·A`."""
        return self.asks_for_parameter(f"{module}.weight")

    def asks_for_parameter(self, name: str) -> bool:
        """Whether a parameter has factors of its own."""
        return any(name == part or name.endswith(f".{part}") for part in self.parameters)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The trained rows of a module's table.

        Raises:
            PeftError: none are.
        """
        found = [rows for end, rows in self.tokens.items() if module.endswith(end)]
        if not found:
            raise PeftError(f"the file has trained rows of {module!r}; trainable_token_indices names none")
        return found[-1]

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return self.rank_of_key(self._key_of(module))

    def rank_of_key(self, key: str) -> int:
        """The rank of what patterns match: a module, or a parameter."""
        return pattern_value(self.rank_pattern, key, self.rank)

    def _key_of(self, module: str) -> str:
        """What patterns match: a module, or a parameter."""
        return f"{module}.weight" if self.by_parameter(module) else module

    def scale_of(self, module: str) -> float:
        """The factor of a module's product `B·A`."""
        return self.scale_of_key(self._key_of(module))

    def scale_of_key(self, key: str) -> float:
        """The factor of the product `B·A` of what patterns match."""
        alpha = pattern_value(self.alpha_pattern, key, self.alpha)
        return alpha / rank_power(self.rank_of_key(key), self.rslora)


def rank_power(rank: int, rslora: bool) -> float:
    """What alpha is divided by: the rank, or its root."""
    return math.sqrt(rank) if rslora else rank


def clean(alpha: float) -> float | int:
    """Alpha as it was given: rid of the rounding of `alpha / √r · √r`, and whole where it is."""
    rounded = round(alpha, 9)
    return int(rounded) if rounded == int(rounded) else rounded


def read_config(folder: Path) -> LoraConfig:
    """The configuration of a folder.

    Raises:
        PeftError: there is none; it is of another method than LoRA and its relatives, of a variant that
            we have not, or of an initialization that needs the base's residual.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise PeftError(f"{folder} holds no PEFT adapter: there is no {CONFIG}")
    given = read_json(file)
    if given.get("peft_type") != "LORA":
        raise PeftError(
            f"{file} has peft_type {given.get('peft_type')!r}; peftjax reads 'LORA' "
            "(with rsLoRA and DoRA), 'PREFIX_TUNING' and the types of its other methods"
        )
    for name, value in given.items():
        if name not in FIELDS and name != "runtime_config" and value:
            raise PeftError(
                f"{file} sets {name}, which this reader does not know; closest: {nearest(name, FIELDS)}"
            )
    for name, reason in REFUSED.items():
        if given.get(name):
            raise PeftError(f"{file} sets {name}: {reason}")
    _require_plain_start(file, given.get("init_lora_weights", True))
    held = checked(_File, {name: value for name, value in given.items() if value is not None}, file)
    return LoraConfig(
        rank=held.r,
        alpha=held.lora_alpha,
        rank_pattern=held.rank_pattern,
        alpha_pattern=held.alpha_pattern,
        rslora=held.use_rslora,
        dora=held.use_dora,
        dropout=held.lora_dropout,
        lora_bias=held.lora_bias,
        tokens=_tokens(held.trainable_token_indices),
        parameters=tupled(held.target_parameters),
        **held.common(),
    )


def _tokens(given: list[int] | dict[str, list[int]] | None) -> dict[str, tuple[int, ...]]:
    if isinstance(given, list):
        given = {"": given}
    return {end: tuple(rows) for end, rows in (given or {}).items() if rows}


def _require_plain_start(file: Path, start: Any) -> None:
    if start is None or start in PLAIN_STARTS:
        return
    raise PeftError(
        f"{file} has init_lora_weights {start!r}: its factors belong to a residual of the base that is not "
        "in the file; save it again from PEFT with save_pretrained(..., "
        "path_initial_model_for_weight_conversion=FOLDER_OF_THE_INITIAL_ADAPTER), which makes it plain LoRA"
    )
