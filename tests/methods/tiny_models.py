"""The models every registered method is tested on, of width 8."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from support import KEY

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.block_config import BlockConfig, Experts
from peftjax.models.bert import BertConfig, bert
from peftjax.models.decoder import DecoderConfig, decoder
from peftjax.testing.model import Model, moved

VOCABULARY, WIDTH, LAYERS = 11, 8, 2
# Of a backbone: what chooses among the layers below the last two needs some to choose from.
BLOCKS = 6
TOKENS = jax.random.randint(KEY, (2, 5), 0, VOCABULARY)
# Every weight a method may know how to adapt, for the methods whose default is 'all-linear'.
EVERY_WEIGHT = r".*(kernel|embedding)"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        def dense(name, width, **options):
            return nn.Dense(width, name=name, **options)

        h = nn.LayerNorm(name="norm_1")(x)
        # A key's bias shifts all of a row's logits alike: it has no gradient, so there is none.
        q, k, v = (dense(name, WIDTH, use_bias=name != "key")(h) for name in ("query", "key", "value"))
        h = nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
        x = x + dense("out", WIDTH)(h)
        h = nn.LayerNorm(name="norm_2")(x)
        return x + dense("down", WIDTH)(nn.gelu(dense("up", 12)(h))), None


class Words(nn.Module):
    """The smallest model with a lookup, linear layers and a tied output."""

    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="words", dtype=self.dtype)
        dense = nn.remat(nn.Dense, prevent_cse=False) if self.remat else nn.Dense
        h = nn.tanh(dense(12, name="up", dtype=self.dtype)(embed(tokens)))
        h = dense(WIDTH, name="down", dtype=self.dtype)(h)
        return embed.attend(nn.LayerNorm(name="norm", dtype=self.dtype)(h))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="words")
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = stack(name="blocks")(embed(tokens), None)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class Vit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (2, 2), strides=(2, 2), name="patch_conv")(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False, name="layers_0")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(WIDTH, (3, 3), kernel_dilation=2, name="conv_1")(images))
        x = nn.GroupNorm(2, name="norm")(x)
        x = nn.Conv(WIDTH, (3, 3), feature_group_count=2, padding="CIRCULAR", name="conv_2")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 12, rngs=rngs), nnx.Linear(12, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        self.words = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        # Its random state lies among the parameters: keys and counters, which no method may touch.
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))(rngs)

    def __call__(self, tokens):
        x = self.dropout(self.words(tokens))
        scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.words.attend(scan(x, self.blocks))


def _backbone(block: Mapping[str, Any] | None = None, **changes: Any) -> Model:
    """A decoder of the library, pre-norm, whose classifier reads the last token."""
    # A key's bias has no gradient here either.
    sizes = BlockConfig(
        width=WIDTH,
        num_heads=2,
        inner_size=12,
        activation="silu",
        norm_epsilon=1e-5,
        gated=True,
        norm="rms",
        qkv_bias=False,
        rotary=True,
        causal=True,
    )
    config = DecoderConfig(
        model_type="llama",
        vocab_size=VOCABULARY,
        num_layers=BLOCKS,
        block=dataclasses.replace(sizes, **(block or {})),
        max_positions=16,
        rope={"rope_type": "default", "rope_theta": 1e4},
        labels=("a", "b", "c"),
    )
    return _tiny_backbone(decoder(config, head="classifier", **changes))


def _encoder(head: str = "none") -> Model:
    """An encoder of the library, post-norm."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    return _tiny_backbone(bert(config, head=head))


def _tiny_backbone(model: Backbone) -> Model:
    return Model(model, moved(jax.jit(model.init)(KEY)), {"input_ids": TOKENS})


def _linen(module: nn.Module, batch: jax.Array) -> Model:
    # No parameter stays zero or one, so that every comparison can fail.
    params = moved(jax.jit(module.init)(KEY, batch)["params"])
    return Model(lambda p, x: module.apply({"params": p}, x), params, batch)


def _nnx() -> Model:
    definition, state = nnx.split(NnxStack(nnx.Rngs(0)))
    return Model(lambda state, tokens: nnx.merge(definition, state)(tokens), state, TOKENS)


@functools.cache
def tiny(name: str) -> Model:
    """The model of that name, made once."""
    images = jax.random.normal(KEY, (2, 4, 4, 3))
    makers = {
        "transformer": lambda: _linen(Transformer(), TOKENS),
        "words": lambda: _linen(Words(), TOKENS),
        "words bf16": lambda: _linen(Words(dtype=jnp.bfloat16), TOKENS),
        "words remat": lambda: _linen(Words(remat=True), TOKENS),
        "vit": lambda: _linen(Vit(), images),
        "convolutions": lambda: _linen(Convolutions(), images),
        "nnx": _nnx,
        "backbone": _backbone,
        "backbone bf16": lambda: _backbone(dtype="bfloat16"),
        "backbone remat": lambda: _backbone(remat="nothing_saveable"),
        # All are chosen: a step that changes which ones may raise the loss.
        "experts": lambda: _backbone({"experts": Experts(count=3, chosen=3, bound=1.0), "sinks": True}),
        "encoder": _encoder,
        "encoder classifier": lambda: _encoder("classifier"),
    }
    return dataclasses.replace(makers[name](), name=name)


MODELS = ("transformer", "vit", "convolutions", "nnx", "experts")
BACKBONES = ("backbone", "encoder", "experts")
CLASSIFIERS = ("backbone", "encoder classifier")
