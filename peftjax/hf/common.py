"""What `adapter_config.json` says whatever the adapter's type: which modules, and what is trained beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from peftjax.core.patterns import fullmatches, match

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
Names = str | Sequence[str]
# The output layers that PEFT trains and saves by itself for a task, by the end of their name.
TASK_MODULES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# The embedding whose ties PEFT heeds under ensure_weight_tying; ties of others it overlooks.
TIED_EMBEDDING = "embed_tokens"
# The output layer that PEFT stores beside the embedding under save_embedding_layers.
OUTPUT_LAYER = "lm_head"

_Layer = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]


@dataclass(frozen=True, kw_only=True)
class CommonFile:
    """The fields that adapters of every type may have; null is a field's default."""

    bias: str = "none"
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: _Layer | list[_Layer] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    ensure_weight_tying: bool = False
    task_type: str | None = None

    def common(self) -> dict[str, Any]:
        """The fields of `CommonConfig`."""
        return {
            "bias": self.bias,
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules or None,
            "layers": tupled(self.layers_to_transform),
            "layers_pattern": tupled(self.layers_pattern),
            "modules_to_save": tupled(self.modules_to_save),
            "tied": self.ensure_weight_tying,
            "task": self.task_type,
        }


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What they say, checked.

    Attributes:
        bias: 'none', 'all', or one that ends in 'only': those of the adapted modules.
        target_modules: the modules asked for.
        exclude_modules: those that are not.
        layers: of the list that `layers_pattern` names.
        layers_pattern: names of lists of layers.
        modules_to_save: modules that are trained as they are.
        tied: whether tied modules are kept together.
        task: PEFT's name of the task.
    """

    bias: str
    target_modules: Names | None
    exclude_modules: Names | None
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    tied: bool
    task: str | None

    @property
    def bias_of_adapted(self) -> bool:
        """Whether the biases of the adapted modules are trained."""
        return self.bias.endswith("only")

    def by_parameter(self, module: str) -> bool:
        """Whether what a module has is that of its weight as a parameter."""
        return False

    def scale_of(self, module: str) -> float:
        """What the numbers of a module's adapter are multiplied by."""
        return 1.0

    def targets(self, module: str) -> bool:
        """Whether a list or a pattern asks for a module; 'all-linear' asks for every one."""
        if self.exclude_modules is not None and asked_for(self.exclude_modules, module):
            return False
        saved = {"before": r"(^|.*\.)", "after": r"($|\..*)"}
        if any(match(name, module, **saved) for name in self.modules_to_save):
            return False
        if self.target_modules is None or self.target_modules == "all-linear":
            return self.target_modules is not None
        if not asked_for(self.target_modules, module):
            return False
        exact = isinstance(self.target_modules, str) or module in self.target_modules
        return exact or not self.layers or _layer_of(module, self.layers_pattern) in self.layers


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for key, value in patterns.items():
        if match(key, module, before=r"(.*\.)?(", after=")$"):
            return value
    return default


def asked_for(names: Names, module: str) -> bool:
    """Whether a pattern matches a module's whole name, or one of a list its end."""
    if isinstance(names, str):
        return fullmatches(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def tupled(value: Any) -> tuple[Any, ...]:
    """A value, several of them, or None, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int | str) else tuple(value)


def _layer_of(module: str, patterns: tuple[str, ...]) -> int | None:
    for pattern in patterns or (r"[^.]*",):
        # The first number counts: one further in is an expert's.
        lead = r"(?:^|.*?\.)" if patterns else r".*?\."
        if found := match(pattern, module, before=lead, after=r"\.(\d+)\."):
            return int(found.group(found.re.groups))  # the pattern may have groups of its own
    return None
