"""Prefix tuning in the format of Hugging Face's PEFT: one tensor, `prompt_embeddings` [P, 2 L K H].

PEFT hands keys and values over as a cache of P tokens, so that the places of the tokens begin at P, and ours
at 0: a query at place t is turned by R(t + P) there and by R(t) here, and the scores are the same with

    K_peft = R(P) K        V_peft = V
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from msgspec import Meta

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.rope import rope_type, rotate, rotation
from peftjax.core.errors import PeftError
from peftjax.hf.common import CONFIG, TENSORS
from peftjax.hf.names import Model
from peftjax.io.files import read_as, read_json, replacing
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors
from peftjax.methods.bottleneck.mam import without_mlp
from peftjax.methods.prompt.prefix import prefix
from peftjax.models.decoder import DecoderConfig
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform

NAME, TYPE = "prompt_embeddings", "PREFIX_TUNING"
OF_LENGTH = ("dynamic", "longrope")
"""Rotations that depend on how many tokens there are, which PEFT counts the prefix among."""

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]


@dataclass(frozen=True)
class _Config:
    """What of `adapter_config.json` says the shape of the tensor."""

    num_layers: _Count | None = None
    num_virtual_tokens: _Count | None = None
    num_attention_heads: _Count | None = None
    token_dim: _Count | None = None
    num_transformer_submodules: _Count | None = None


def is_prefix(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT's prefix tuning."""
    file = folder / CONFIG
    return file.is_file() and read_json(file).get("peft_type") == TYPE


def export_prefix(
    path: Path, model: Model, method: Transform, trainable: Trainable, base: str | None
) -> None:
    """Write a prefix for `PeftModel.from_pretrained`, without its MLP.

    Raises:
        PeftError: the model is not a decoder on which PEFT's prefix means the same; layers are left out.
    """
    model = _require_decoder(model)
    block, (_, plain) = model.config.block, without_mlp(method, trainable)
    own = plain["blocks"]["prefix"]["attention"]
    layers, length, width = own["keys"].shape
    if layers != model.num_layers:
        raise PeftError(f"prefix: PEFT's is of all {model.num_layers} layers, and this one of {layers}")
    # [L, 2, P, K H] to [P, L, 2, K H]
    both = jnp.stack([_turned(model, own["keys"], length), own["values"]], axis=1).transpose(2, 0, 1, 3)
    values = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "encoder_hidden_size": width,
        "inference_mode": True,
        "init_weights": None,
        "num_attention_heads": block.kv_heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": TYPE,
        "prefix_projection": False,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
    with replacing(path / TENSORS, path / CONFIG) as (tensor_file, config_file):
        config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_tensors(tensor_file, {NAME: np.asarray(both.reshape(length, -1))}, {"format": "pt"})


def import_prefix(folder: Path, model: Model, params: Params) -> tuple[Transform, Frozen, Trainable]:
    """A prefix that PEFT saved, as `prefix` without an MLP.

    Raises:
        PeftError: the model is not a decoder on which PEFT's prefix means the same; the tensor is missing,
            beside others, or of another shape than the model's layers and heads, or the configuration, ask
            for.
    """
    model = _require_decoder(model)
    config = read_as(_Config, folder / CONFIG)
    names = find_tensors(folder / TENSORS) if (folder / TENSORS).is_file() else {}
    if set(names) != {NAME}:
        raise PeftError(
            f"{folder / TENSORS} must hold {NAME!r} alone, and holds {sorted(names) or 'nothing'}"
        )
    flat = jnp.asarray(dict(read_tensors(names))[NAME], jnp.float32)
    width = model.config.block.kv_heads * model.config.block.head_width
    if flat.ndim != 2 or flat.shape[1] != model.num_layers * 2 * width:
        raise PeftError(
            f"{folder}: {NAME} has the shape {flat.shape}; {model.num_layers} layers of keys and values "
            f"{width} wide are [P, {model.num_layers * 2 * width}]"
        )
    length = len(flat)
    found = {
        "num_layers": model.num_layers,
        "num_virtual_tokens": length,
        "num_attention_heads": model.config.block.kv_heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }
    for name, value in found.items():
        if (said := getattr(config, name)) not in (None, value):
            raise PeftError(f"{folder / CONFIG} has {name} {said}; this model and {NAME} have {value}")
    both = flat.reshape(length, model.num_layers, 2, width).transpose(1, 2, 0, 3)
    own = {"keys": _turned(model, both[:, 0], -length), "values": both[:, 1]}
    method = prefix(length=length, mlp_size=None)
    frozen, _ = method.init(jax.random.key(0), params)
    return method, frozen, {"blocks": {"prefix": {"attention": own}}}


def _turned(model: Backbone, keys: Float[Array, "L P KH"], places: int) -> Float[Array, "L P KH"]:
    """The keys, turned on by so many places."""
    config: Any = model.config
    heads = keys.reshape(*keys.shape[:2], -1, config.block.head_width)
    cos, sin = rotation(jnp.full((1, 1), places), config.block.head_width, config.rope, config.max_positions)
    size = jnp.sqrt(cos[..., :1] ** 2 + sin[..., :1] ** 2)  # a scaled rotation's factor is the query's
    return rotate(heads, (cos / size, sin / size)).reshape(keys.shape)


def _require_decoder(model: Model) -> Backbone:
    config = getattr(model, "config", None)
    reason = None
    if not isinstance(config, DecoderConfig) or model.head_name != "causal_lm":
        reason = "is exchanged with PEFT for decoders with the head 'causal_lm' alone"
    elif config.rope is None or config.learned_positions is not None:
        reason = "moves the learned positions of the tokens by its length in PEFT, and here it does not"
    elif config.windows or config.block.window is not None:
        reason = "is out of sight beyond the window in PEFT, and here it is not"
    elif rope_type(config.rope) in OF_LENGTH:
        reason = f"counts as tokens in PEFT for the rotation {rope_type(config.rope)!r}, and here it does not"
    if reason is not None:
        raise PeftError(f"a prefix {reason}; keep it with save_adapter")
    return model
