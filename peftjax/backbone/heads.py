"""The heads of encoders: each is `(hidden [B, S, D], context, embed parameters) -> outputs`."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from peftjax.backbone.context import Context
from peftjax.backbone.layers import ACTIVATIONS, Dropout, dense, layer_norm, recompute
from peftjax.backbone.logits import Logits
from peftjax.backbone.protocols import Params


def mean_pool(hidden: Float[Array, "B S D"], mask: Bool[ArrayLike, "B S"] | None) -> Float[Array, "B D"]:
    """The mean of the hidden states where `mask` is True, None is everywhere; zero for a row without any."""
    mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
    weights = mask.astype(hidden.dtype)
    total = jnp.einsum("bsd,bs->bd", hidden, weights, preferred_element_type=jnp.float32)
    count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return (total / count).astype(hidden.dtype)


class Hidden(nn.Module):
    """No head: the hidden states [B, S, D]."""

    dtype: DTypeLike

    def __call__(self, hidden: Array, context: Context, embed: Params) -> Float[Array, "B S D"]:
        """Return `hidden`."""
        return hidden


class MeanPool(nn.Module):
    """The mean over the tokens [B, D], as sentence encoders use it."""

    dtype: DTypeLike

    def __call__(self, hidden: Array, context: Context, embed: Params) -> Float[Array, "B D"]:
        """Pool over `context.mask`."""
        return mean_pool(hidden, context.mask)


class Pooler(nn.Module):
    """The pooler of Hugging Face's `BertModel`: `tanh(hidden[:, 0] W + b)`, [B, D]."""

    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, context: Context, embed: Params) -> Float[Array, "B D"]:
        """Pool the first token."""
        pooler = dense(hidden.shape[-1], self.init_std, self.dtype, "pooler")
        return jnp.tanh(pooler(hidden[:, 0]))


class Classifier(nn.Module):
    """A classifier on the first token: linear, tanh, dropout, linear; logits [B, C].

    With "pooler" as `first`, the name of its first layer, it is `BertForSequenceClassification`'s;
    `RobertaForSequenceClassification` has a layer of its own, "dense", and dropout before it too.
    """

    num_labels: int
    dropout: float
    init_std: float
    dtype: DTypeLike
    first: str = "pooler"
    input_dropout: float = 0.0

    @nn.compact
    def __call__(self, hidden: Array, context: Context, embed: Params) -> Float[Array, "B C"]:
        """Classify the first token."""
        first = dense(hidden.shape[-1], self.init_std, self.dtype, self.first)
        classifier = dense(self.num_labels, self.init_std, self.dtype, "classifier")
        inner = first(Dropout(self.input_dropout)(hidden[:, 0]))
        return classifier(Dropout(self.dropout)(jnp.tanh(inner)))


class MeanClassifier(nn.Module):
    """Mean pooling, dropout and a linear classifier, for sentence encoders; logits [B, C]."""

    num_labels: int
    dropout: float
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, context: Context, embed: Params) -> Float[Array, "B C"]:
        """Classify the mean over the tokens."""
        classifier = dense(self.num_labels, self.init_std, self.dtype, "classifier")
        return classifier(Dropout(self.dropout)(mean_pool(hidden, context.mask)))


class OutputKernel(nn.Module):
    """An output layer's `kernel` [D, V], given away unread."""

    width: int
    vocab_size: int
    init_std: float

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        """The kernel."""
        shape = (self.width, self.vocab_size)
        return self.param("kernel", nn.initializers.normal(self.init_std), shape)


class MaskedLM(nn.Module):
    """A head for masked words, its decoder tied to the word embedding or not; `Logits` [B, S, V]."""

    vocab_size: int
    activation: str
    norm_epsilon: float
    init_std: float
    dtype: DTypeLike
    tied: bool = True

    @nn.compact
    def __call__(self, hidden: Array, context: Context, embed: Params) -> Logits:
        """Score every word at every position."""
        transform = dense(hidden.shape[-1], self.init_std, self.dtype, "transform")
        norm = layer_norm(self.norm_epsilon, self.dtype, "norm")
        hidden = norm(recompute(ACTIVATIONS[self.activation])(transform(hidden)))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        if self.tied:
            return Logits(hidden, embed["word"]["embedding"], bias, tied=True)
        kernel = OutputKernel(hidden.shape[-1], self.vocab_size, self.init_std, name="output")()
        return Logits(hidden, kernel, bias)
