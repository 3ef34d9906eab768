"""The tensors of a checkpoint, those of a coded weight as one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import Tensor, describe_tensors, find_tensors
from peftjax.models.quantized.awq import awq
from peftjax.models.quantized.bitsandbytes import bitsandbytes
from peftjax.models.quantized.compressed_tensors import compressed_tensors
from peftjax.models.quantized.gptq import gptq
from peftjax.models.quantized.mxfp4 import of_experts
from peftjax.models.quantized.scheme import CodedTensor, Scheme, gathered

SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "bitsandbytes": bitsandbytes,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "mxfp4": of_experts,
}
"""By Hugging Face's `quant_method`."""


def stored_tensors(folder: Path, values: Mapping[str, Any]) -> dict[str, Tensor | CodedTensor]:
    """Everything that a checkpoint holds, by its name there or, of a coded weight, the name of a plain one.

    Args:
        folder: the checkpoint.
        values: of its `config.json`, which tells how it was quantized.

    Raises:
        PeftError: a file cannot be read, or `quantization_config` says what is not supported.
    """
    tensors = describe_tensors(find_tensors(folder))
    settings = values.get("quantization_config")
    if settings is None:
        return dict(tensors)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if not isinstance(settings, Mapping) or method not in SCHEMES:
        raise PeftError(
            f"{folder} is quantized by {method!r}; supported: {', '.join(SCHEMES)}. Others: load it with "
            "transformers, dequantize it and write it again by save_pretrained(folder)"
        )
    scheme = SCHEMES[method](settings)
    return gathered(tensors, scheme, _dtype(values, scheme.dtype))


def _dtype(values: Mapping[str, Any], usual: str) -> np.dtype:
    """The dtype of a checkpoint before it was quantized."""
    name = values.get("dtype") or values.get("torch_dtype")
    return jnp.dtype(name if name in ("float32", "float16", "bfloat16") else usual)
