"""T5 (Raffel et al. 2020, arXiv 1910.10683), also 1.1 and Flan, and mT5 (Xue et al. 2021, arXiv 2010.11934).

Both stacks are scans of the one block, without scaled scores and with a bias of relative positions that a
stack computes once for all its layers. In float16 the feed-forwards of pretrained checkpoints overflow;
bfloat16 does not.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from peftjax.backbone.backbone import TOKENS, Backbone, Batch, Params
from peftjax.backbone.block import Block
from peftjax.backbone.block_config import make_norm
from peftjax.backbone.context import Context
from peftjax.backbone.heads import OutputKernel, mean_pool
from peftjax.backbone.layers import Dropout, dense
from peftjax.backbone.logits import Logits
from peftjax.core.errors import PeftError
from peftjax.models.family import FEATURES, Family, Head, require_known, with_prefix
from peftjax.models.t5_config import T5Config, read_config, write_config
from peftjax.models.t5_positions import RelativeBias
from peftjax.models.vocabulary import row_ids
from peftjax.models.weight_map import TensorEntry, embedding, linear

ENCODER_HEADS = ("encoder", "mean")


Side = Literal["encoder", "decoder"]


def decoder_ids(config: T5Config, batch: Batch, head: str) -> Int[Array, "B T"]:
    """`decoder_input_ids`, or those that predict the labels; for a classifier, those that repeat the text.

    Labels are aligned with the outputs: the ids are the labels moved one place on, after
    `decoder_start_token_id`, with `pad_token_id` for a negative label.

    Raises:
        PeftError: when there is nothing to make them of, or the configuration lacks one of those two.
    """
    if "decoder_input_ids" in batch:
        return batch["decoder_input_ids"]
    source = "input_ids" if head == "classifier" else "labels"
    if source not in batch:
        raise PeftError(f"the batch has no decoder_input_ids, and no {source} to make them of")
    for name in ("decoder_start_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            raise PeftError(f"{config.model_type}: config.json has no {name}; give decoder_input_ids")
    before = jnp.pad(batch[source][:, :-1], [(0, 0), (1, 0)], constant_values=config.decoder_start_token_id)
    return jnp.where(before < 0, config.pad_token_id, before)


def last_eos(config: T5Config, batch: Batch, length: int) -> Int[Array, " B"]:
    """The place of the last eos of each row of `input_ids`, or of its last token where there is none.

    Raises:
        PeftError: when the decoder does not read as many tokens as the encoder.
    """
    ids = batch["input_ids"]
    if ids.shape[1] != length:
        raise PeftError(
            f"a classifier reads the decoder where input_ids has its eos: {ids.shape[1]} input_ids, "
            f"{length} decoder_input_ids"
        )
    token = jnp.where(batch.get("attention_mask", jnp.ones_like(ids)) != 0, 1, 0)
    rank = token + 2 * jnp.isin(ids, jnp.array(config.eos_token_ids, ids.dtype))
    return length - 1 - jnp.argmax(rank[:, ::-1], axis=1)


class T5Embed(nn.Module):
    """The word embeddings of one stack, and what its blocks share: mask and bias of the scores."""

    config: T5Config
    side: Side
    head: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Float[Array, "B T D"], Context]:
        """Embed a batch.

        Args:
            batch: `input_ids` [B, S] int32, and optionally `attention_mask` [B, S] (1 = token),
                `decoder_input_ids` [B, T] or `labels` [B, T] to make them of, and
                `decoder_attention_mask` [B, T].
        """
        config, decoder = self.config, self.side == "decoder"
        ids = decoder_ids(config, batch, self.head) if decoder else batch["input_ids"]
        init = nn.initializers.normal(config.initializer_factor)
        own = "decoder_word" if decoder and config.apart else "word"
        table = nn.Embed(config.vocab_size, config.d_model, embedding_init=init, name=own)
        # Cast the rows looked up, not the table, whose copy would be larger.
        names = (
            ("decoder_input_ids", "decoder_attention_mask") if decoder else ("input_ids", "attention_mask")
        )
        known = row_ids(batch, ids, config.vocab_size, name=names[0], mask=names[1])
        hidden = Dropout(config.dropout_rate)(table(known).astype(self.dtype))
        bias = RelativeBias(
            heads=config.num_heads,
            buckets=config.relative_attention_num_buckets,
            farthest=config.relative_attention_max_distance,
            both_sides=not decoder,
            init_std=config.initializer_factor * config.d_model**-0.5,
            dtype=self.dtype,
            name=f"{self.side}_positions",
        )
        scores = bias(ids.shape[1])
        masks = {"mask": "attention_mask"}
        if decoder:
            masks = {"mask": "decoder_attention_mask", "encoded_mask": "attention_mask"}
        seen = {ours: batch[name] != 0 for ours, name in masks.items() if name in batch}
        last = last_eos(config, batch, ids.shape[1]) if self.head == "classifier" else None
        return hidden, Context(bias=scores, last=last, **seen)


class T5Classifier(nn.Module):
    """`T5ForSequenceClassification`'s head: dense, tanh, out_proj, each after dropout."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Float[Array, "B D"]) -> Float[Array, "B C"]:
        """Class logits."""
        config, width = self.config, self.config.d_model
        std = config.initializer_factor * width**-0.5
        hidden = dense(width, std, self.dtype, "dense")(Dropout(config.classifier_dropout)(hidden))
        hidden = Dropout(config.classifier_dropout)(jnp.tanh(hidden))
        return dense(len(config.labels), std, self.dtype, "out_proj")(hidden)


class T5Head(nn.Module):
    """A stack's last norm and dropout, and what reads them."""

    config: T5Config
    kind: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, context: Context, embed: Params) -> Array | Logits:
        """`Logits` [B, T, V], class logits [B, C], mean states [B, D] or states [B, T, D]."""
        config, width = self.config, self.config.d_model
        norm = make_norm(config.block(decoder=False), self.dtype, "norm")
        hidden = Dropout(config.dropout_rate)(norm(hidden))
        match self.kind:
            case "seq2seq_lm":
                if config.scaled_output:
                    hidden = hidden * jnp.asarray(width**-0.5, self.dtype)
                if config.tied:
                    return Logits(hidden, embed["word"]["embedding"], tied=True)
                output = OutputKernel(width, config.vocab_size, config.initializer_factor, name="output")
                return Logits(hidden, output())
            case "classifier":
                last = jnp.take_along_axis(hidden, context.last[:, None, None], axis=1)[:, 0]
                return T5Classifier(config, self.dtype, name="classifier")(last)
            case "mean":
                return mean_pool(hidden, context.mask)
        return hidden


def t5(
    config: T5Config, *, head: str = "seq2seq_lm", dtype: str = "float32", remat: str | None = None
) -> Backbone:
    """Build T5, or its encoder alone.

    Args:
        config: the sizes and rates.
        head: "seq2seq_lm" (`Logits` [B, T, V]), "none" (the decoder's states [B, T, D]), "classifier"
            (`T5ForSequenceClassification`, logits [B, C]); and without a decoder "encoder" (the encoder's
            states [B, S, D]) or "mean" (their mean over the tokens [B, D]).
        dtype: compute dtype of `Backbone`.
        remat: checkpoint policy of `Backbone`, in both stacks.

    Raises:
        PeftError: for an unknown head, and as `Backbone`.
    """
    require_known(config.model_type, "head", head, _heads(""))

    def stack(side: Side, head: str, **settings: Any) -> Backbone:
        decoder = side == "decoder"
        return Backbone(
            config=config,
            embed=T5Embed(config, side, head, dtype),
            block=Block(config.block(decoder=decoder), dtype),
            head=T5Head(config, head, dtype),
            num_layers=config.num_decoder_layers if decoder else config.num_layers,
            head_name=head,
            remat=remat,
            dtype=dtype,
            **settings,
        )

    if head in ENCODER_HEADS:
        return stack("encoder", head)
    example = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"]}
    return stack("decoder", head, encoder=stack("encoder", "encoder"), example=example)


def _heads(prefix: str) -> dict[str, Head]:
    """The heads by the names of the Hugging Face classes, which begin with `prefix`.

    Their files hold the table as `shared`, a module that no forward calls: each stack has its own, tied to
    it, and so has the output layer.
    """
    word = "embed/word"
    encoder, decoder = (embedding(word, f"{side}.embed_tokens") for side in ("encoder", "decoder"))
    output = TensorEntry(f"{word}/embedding", "lm_head.weight", kind="tied")
    uncalled = frozenset({"shared.weight"})
    alone = {"tied": (encoder,), "uncalled": uncalled}
    both = {"tied": (encoder, decoder), "uncalled": uncalled}
    return {
        "seq2seq_lm": Head(
            f"{prefix}ForConditionalGeneration",
            task="SEQ_2_SEQ_LM",
            tied=(encoder, decoder, output),
            uncalled=uncalled,
        ),
        "classifier": Head(
            f"{prefix}ForSequenceClassification",
            "head/classifier/",
            labeled=True,
            task="SEQ_CLS",
            in_memory=with_prefix("transformer.", "classification_head"),
            **both,
        ),
        "none": Head(f"{prefix}Model", **both, **FEATURES),
        "encoder": Head(f"{prefix}EncoderModel", **alone, **FEATURES),
        "mean": Head(f"{prefix}EncoderModel", **alone, **FEATURES),
    }


def weights(model: Backbone) -> tuple[TensorEntry, ...]:
    """Every parameter with its Hugging Face name; of an encoder alone, without `encoder/`."""
    gated, positions = model.config.gated, "block.0.layer.0.SelfAttention.relative_attention_bias"
    shared = (
        embedding("embed/word", "encoder.embed_tokens" if model.config.apart else "shared"),
        embedding("embed/decoder_word", "decoder.embed_tokens"),
        embedding("embed/encoder_positions", f"encoder.{positions}"),
        embedding("embed/decoder_positions", f"decoder.{positions}"),
    )
    if model.encoder is None:
        return (*shared, *_stack("", "encoder", gated))
    return (
        *shared,
        *_stack("encoder/", "encoder", gated),
        *_stack("", "decoder", gated),
        _kernel("head/output", "lm_head"),
        *linear("head/classifier/dense", "classification_head.dense"),
        *linear("head/classifier/out_proj", "classification_head.out_proj"),
    )


def _stack(path: str, side: Side, gated: bool) -> tuple[TensorEntry, ...]:
    """The table of the stack whose parameters are at `path`."""
    attentions = {"attention": "SelfAttention"}
    if side == "decoder":
        attentions["cross_attention"] = "EncDecAttention"
    letters = {"query": "q", "key": "k", "value": "v", "output": "o"}
    products = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    blocks, layer = f"{path}blocks", f"{side}.block.{{layer}}.layer"
    return (
        *(
            _kernel(f"{blocks}/{branch}/{ours}", f"{layer}.{place}.{module}.{letter}")
            for place, (branch, module) in enumerate(attentions.items())
            for ours, letter in letters.items()
        ),
        *(
            _kernel(f"{blocks}/feed_forward/{ours}", f"{layer}.{len(attentions)}.DenseReluDense.{theirs}")
            for ours, theirs in products.items()
        ),
        *(
            _scale(f"{blocks}/{branch}_norm", f"{layer}.{place}.layer_norm")
            for place, branch in enumerate((*attentions, "feed_forward"))
        ),
        _scale(f"{path}head/norm", f"{side}.final_layer_norm"),
    )


def _kernel(path: str, name: str) -> TensorEntry:
    return TensorEntry(f"{path}/kernel", f"{name}.weight", transpose=True)


def _scale(path: str, name: str) -> TensorEntry:
    return TensorEntry(f"{path}/scale", f"{name}.weight")


def canonical(name: str) -> str:
    """Hugging Face's spelling without the prefix of a classifier's base model."""
    return name.removeprefix("transformer.")


# A table that nothing reads.
IGNORED = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
T5, MT5 = (
    Family(
        name=name,
        read_config=read_config,
        write_config=write_config,
        build=t5,
        heads=_heads(prefix),
        weights=weights,
        canonical=canonical,
        ignored=IGNORED,
    )
    for name, prefix in (("t5", "T5"), ("mt5", "MT5"))
)
