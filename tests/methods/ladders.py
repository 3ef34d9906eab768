"""Backbones with side networks, and a ladder written as a plain loop, for the tests of LST."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny_t5
from support import KEY
from tiny_models import TOKENS

import peftjax as pj
from peftjax.backbone.block_config import BlockConfig
from peftjax.models.bert import BertConfig, bert
from peftjax.models.decoder import DecoderConfig, decoder
from peftjax.models.vit import ViTConfig, vit
from peftjax.testing.model import Model, moved

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}


def _llama(**block):
    settings = {"width": 16, "num_heads": 4, "num_kv_heads": 2, "inner_size": 20, "activation": "silu"}
    settings |= {"norm_epsilon": 1e-5, "gated": True, "norm": "rms", "rotary": True, "causal": True}
    return decoder(
        DecoderConfig(
            model_type="llama",
            vocab_size=11,
            num_layers=3,
            block=BlockConfig(**{**settings, **block}),
            max_positions=16,
            rope={"rope_type": "default", "rope_theta": 1e4},
        ),
        head="none",
    )


def _bert(**changes):
    config = {"vocab_size": 11, "hidden_size": 16, "max_position_embeddings": 16, **SIZES, **changes}
    return bert(BertConfig(**config))


@functools.cache
def backbone(name: str) -> Model:
    """A backbone of that family with three layers, of width 16."""
    if name == "t5":
        model, params = tiny_t5.make()
        return Model(model, params, tiny_t5.token_batch())
    if name == "vit":
        model = vit(ViTConfig(hidden_size=16, **SIZES, image_size=(4, 4), patch_size=(2, 2)))
        batch = {"pixel_values": jax.random.normal(KEY, (2, 3, 4, 4))}
    else:
        gemma = {"norm": "rms_plus_one", "norm_order": "sandwich", "qk_norm": True}
        makers = {
            "bert": _bert,
            "bert dropout": lambda: _bert(hidden_dropout_prob=0.5),
            "llama": _llama,
            "gemma": lambda: dataclasses.replace(_llama(**gemma), per_layer={"window": (2, 9, 3)}),
            "fused": lambda: _llama(rotary=False, fused_qkv=True, num_kv_heads=4),
        }
        model, batch = makers[name](), {"input_ids": TOKENS}
    return Model(model, moved(jax.jit(model.init)(KEY)), batch)


def adapted(name: str, **options):
    """The model with a side network as after some training, and its parameters."""
    tiny, method = backbone(name), pj.lst(reduction=2, **options)
    frozen, trainable = jax.jit(method.init)(KEY, tiny.params)
    trainable = moved(trainable)
    return method.model(tiny.forward), method.apply(frozen, trainable), trainable


def climbed(model, params, side, hidden, context, own, used, gate=True):
    """The last states of the backbone and of its side network, by a loop over the layers."""
    config = model.block.config
    kernel = side["layers"]["attention"]["output"]["kernel"]
    small = dataclasses.replace(
        config,
        width=kernel.shape[2],
        head_dim=kernel.shape[1] // config.num_heads,
        inner_size=side["layers"]["feed_forward"]["down"]["kernel"].shape[1],
    )
    block = model.block.clone(config=small)
    linear = lambda part, x: x @ part["kernel"] + part["bias"]
    stream = linear(side["first"], hidden)
    for layer in range(model.num_layers):
        differs = {name: np.asarray(values)[layer] for name, values in model.per_layer.items()}
        at = lambda tree, row: {"params": jax.tree.map(lambda leaf: leaf[row], tree)}
        hidden = model.block.apply(
            at(params["blocks"], layer), hidden, dataclasses.replace(context, **differs)
        )
        if layer in used:
            row = used.index(layer)
            below = linear(at(side["down"], row)["params"], hidden)
            share = jax.nn.sigmoid(side["gate"][row] / 0.1) if gate else None
            stream = share * stream + (1 - share) * below if gate else stream + below
            stream = block.apply(
                at(side["layers"], row), stream, dataclasses.replace(context, **own, **differs)
            )
    if "norm" in side:
        norm = {"params": {"feed_forward_norm": side["norm"]}}
        stream = block.apply(norm, stream, method="normalize_feed_forward")
    return hidden, stream


def up(side, stream):
    return stream @ side["up"]["kernel"] + side["up"]["bias"]


def halved(context):
    """The rotation of heads half as wide."""
    if context.rotation is None:
        return {}
    angles = jnp.arctan2(context.rotation[1], context.rotation[0])[..., ::2]
    return {"rotation": (jnp.cos(angles), jnp.sin(angles))}
