"""Which layers see a sliding window, from the content of a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.models.family import require_known

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)


def read_windows(values: Mapping[str, Any], layer_types: Sequence[str]) -> tuple[int | None, ...]:
    """How many places back each layer sees, None for all, [num_layers].

    Args:
        values: the content of `config.json`; its `layer_types` go before the argument.
        layer_types: the family's own order of "full_attention" and "sliding_attention".

    Raises:
        PeftError: for another type, another number of them than of layers, or no width of a window.
    """
    who, types = values["model_type"], values.get("layer_types") or layer_types
    for name in types:
        require_known(who, "layer_types", name, LAYER_TYPES)
    if len(types) != values["num_hidden_layers"]:
        raise PeftError(f"{who}: {len(types)} layer_types for {values['num_hidden_layers']} layers")
    window = values.get("sliding_window")
    if SLIDING in types and (not isinstance(window, int) or window < 1):
        raise PeftError(f"{who}: sliding_window must be a positive integer, not {window!r}")
    return tuple(window if name == SLIDING else None for name in types)


def window_settings(windows: tuple[int | None, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of `BlockConfig` and of `DecoderConfig` that give the layers these windows.

    A window that all layers share is part of the block: a static one lets attention skip the keys
    outside it.
    """
    if len(set(windows)) == 1:
        return {"window": windows[0]}, {}
    return {}, {"windows": windows}
