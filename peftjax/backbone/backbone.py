"""A backbone: three Flax Linen modules used as pure functions, the blocks stacked and scanned."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from peftjax.backbone.block_config import AttentionKind
from peftjax.backbone.context import Context
from peftjax.backbone.logits import Logits
from peftjax.backbone.on_mesh import (
    embeddings_on_mesh,
    ids_on_mesh,
    logits_on_mesh,
    require_heads,
    require_mesh,
    stream_on_mesh,
)
from peftjax.backbone.protocols import Batch, BlockModule, Cache, DropoutKey, Module, Params
from peftjax.backbone.remat import BLOCK_INPUT, REMAT_POLICIES, read_remat
from peftjax.core.checks import positive
from peftjax.core.errors import PeftError

Part = Literal["block", "attention", "feed_forward"]
TOKENS: Batch = {"input_ids": jax.ShapeDtypeStruct((1, 1), jnp.int32)}
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def dropout_rngs(key: DropoutKey) -> dict[str, Key[Array, ""]]:
    """The Linen rngs for one `apply`: none (deterministic) when `key` is None."""
    return {} if key is None else {"dropout": key}


class Layer(NamedTuple):
    """One layer of a stack, or, with a leading axis, all of them."""

    weights: Params
    """The block's parameters."""
    own: dict[str, Array]
    """What joins the `Context`, by its fields: its number as `layer`, and the backbone's `per_layer`."""
    key: DropoutKey
    """Of its dropout."""


class Stack(Protocol):
    """Runs the blocks of a backbone, whose `layers` and `run_layer` it is written with.

    What `run` and `run_cached` return besides the cache goes to the backbone's head as `hidden`.
    """

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Any:
        """What the head reads; see `Backbone.run_blocks`."""

    def empty_cache(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> Cache:
        """An empty cache; see `Backbone.empty_cache`."""

    def run_cached(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        cache: Cache,
    ) -> tuple[Any, Cache]:
        """`run` for further tokens, and the cache with them; see `Backbone.run_blocks_cached`."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """One block after the other, as a scan under the backbone's `remat` policy."""

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Float[Array, "B S D"]:
        """The hidden states after the last block."""

        def body(hidden: Array, layer: Layer) -> tuple[Array, None]:
            return model.run_layer(layer, hidden, context), None

        layers, length = model.layers(params, key), model.num_layers
        return jax.lax.scan(model.checkpointed(body), hidden, layers, length=length, unroll=model.unroll)[0]

    def empty_cache(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> Cache:
        """Zeros for the keys and values of every layer, in the compute dtype."""

        def first_layer(params: Params, hidden: Array, context: Context) -> Cache:
            first = jax.tree.map(lambda leaf: leaf[0], model.layers(params))
            return model.run_layer_cached(first, hidden, context, {})[1]

        one = jax.eval_shape(first_layer, params, hidden, context)
        return jax.tree.map(lambda leaf: jnp.zeros((model.num_layers, *leaf.shape[1:]), leaf.dtype), one)

    def run_cached(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        cache: Cache,
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """The scan carries the cache and each block writes its own slots: it is changed in place."""

        def body(carry: tuple[Array, Cache], layer: Layer) -> tuple[Any, None]:
            hidden, cache = carry
            return model.run_layer_cached(layer, hidden, context, cache), None

        layers, length = model.layers(params), model.num_layers
        return jax.lax.scan(body, (hidden, cache), layers, length=length, unroll=model.unroll)[0]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model as the pure function `model(params, batch, *, key=None) -> outputs`.

    `params` is `{"embed": ..., "blocks": ..., "head": ...}`, each leaf of `blocks` stacked
    [num_layers, ...]. Change `remat` or `dtype` with `dataclasses.replace`.

    An encoder-decoder is the decoder's backbone with the encoder's as `encoder`, whose parameters are
    `params["encoder"]`, `{"blocks", "head"}`. Both stacks are then the same thing to a rewrite, which
    changes the encoder as it would change an encoder alone; the task's head stays `params["head"]`.
    The stacks share `params["embed"]`, as they share its word table. What the encoder gives is part of
    what all blocks of the decoder share, so `run_embed` runs it: `Context.encoded`.

    Attributes:
        config: the family's configuration.
        embed: `(batch) -> (hidden [B, S, D], context)`.
        block: `(hidden, context) -> hidden`, with its branches and norms as methods.
        head: `(hidden, context, params["embed"]) -> outputs`.
        num_layers: how many blocks are stacked.
        head_name: the name the family knows `head` by, such as "classifier".
        remat: a name in `REMAT_POLICIES`, "offload_attention" with or without a share, for
            `jax.checkpoint` around each block; None or "none" keeps what the block's own layers keep.
        feed_forward_tile: how many of each row's tokens the feed-forward of a block takes at a time, for long
            rows: its inner activations exist of those alone, and its backward pass computes them again.
            None takes all. Where a mesh divides tokens, so many of each device's.
        attention: "rows" is attention in blocks of query rows, of any kind. "flash" is the platform's kernel,
            chosen when the program is lowered: splash attention on a TPU, cuDNN's on an NVIDIA GPU. Where
            there is none, and with a cache, it is row blocks; each reason is logged once.
        mesh: of `pj.parallel.make_mesh`, on which activations lie by rows, tokens and heads; None leaves them
            to the compiler.
        per_layer: what differs between the layers, arrays [num_layers, ...] by the field of the
            `Context` that they are in each block, such as `window`.
        stack: how the blocks are run; a method may put its own instead of the scan.
        unroll: how many layers one step of the scan runs; more compile longer and may run faster.
        encoder: the backbone that reads the batch first; it follows `dtype`, `remat`, `unroll`,
            `feed_forward_tile`, `attention` and `mesh`.
        example: the shapes and dtypes of a smallest batch, from which `init` takes those of the parameters.
        dtype: compute dtype, "float32", "bfloat16" or "float16"; weights are cast where they are
            used and `params` stay as they are.

    Raises:
        PeftError: when `remat`, `dtype` or `attention` is not one of these names, `feed_forward_tile` is not
            positive, the mesh has other axes, or `sequence` is divided by more than the heads allow.
    """

    config: Any
    embed: Module
    block: BlockModule
    head: Module
    num_layers: int
    head_name: str = "none"
    remat: str | None = None
    dtype: str = "float32"
    feed_forward_tile: int | None = None
    attention: AttentionKind = "rows"
    mesh: Mesh | None = None
    per_layer: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    stack: Stack = dataclasses.field(default_factory=Scan)
    unroll: int = 1
    encoder: Backbone | None = None
    example: Batch = dataclasses.field(default_factory=lambda: TOKENS, hash=False)

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise PeftError(f"dtype {self.dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
        name, share = read_remat(self.remat)
        if name not in ("none", *REMAT_POLICIES):
            close = difflib.get_close_matches(str(self.remat), REMAT_POLICIES, n=3, cutoff=0.3)
            raise PeftError(
                f"remat policy {self.remat!r} is unknown; "
                f"closest: {', '.join(close or REMAT_POLICIES)}; or 'none'"
            )
        for part in ("embed", "block", "head"):
            # The modules follow `dtype`, so that `dataclasses.replace` alone changes it.
            module = getattr(self, part).clone(dtype=jnp.dtype(self.dtype))
            object.__setattr__(self, part, module)
        positive("backbone", "feed_forward_tile", self.feed_forward_tile)
        if self.mesh is not None:
            require_mesh(self.mesh)
        if self.attention not in get_args(AttentionKind):
            raise PeftError(
                f"attention {self.attention!r} is not one of {', '.join(get_args(AttentionKind))}"
            )
        windows = self.per_layer.get("window", ()) if self.attention == "flash" else ()
        policy = {
            "offloaded_tokens": share,
            "feed_forward_tile": self.feed_forward_tile,
            "attention": self.attention,
            "windows": tuple(sorted({int(width) for width in windows})),
            "mesh": self.mesh,
        }
        config = getattr(self.block, "config", None)  # a block of another maker's may have none
        plain = {"offloaded_tokens": 0.0, "attention": "rows", "windows": ()}
        has = plain if config is None else vars(config)
        if self.mesh is not None and config is not None:
            require_heads(self.mesh, config.num_heads)
        if any(has.get(name) != value for name, value in policy.items()):
            config = dataclasses.replace(config, **policy)
            object.__setattr__(self, "block", self.block.clone(config=config))
        if self.encoder is not None:
            followed = ("dtype", "remat", "unroll", "feed_forward_tile", "attention", "mesh")
            same = {name: getattr(self, name) for name in followed}
            object.__setattr__(self, "encoder", dataclasses.replace(self.encoder, **same))

    def __call__(self, params: Params, batch: Batch, *, key: DropoutKey = None) -> Array | Logits:
        """Run embed, blocks and head.

        Args:
            params: `{"embed", "blocks", "head"}`, and `"encoder"` where there is one.
            batch: for token models `input_ids` [B, S] int32, and optionally `attention_mask`
                [B, S] (1 = token; default all tokens), `position_ids` [B, S] and `token_type_ids`
                [B, S]; for image models `pixel_values` [B, C, H, W]; for encoder-decoders also
                `decoder_input_ids` [B, T], or `labels` [B, T] to make them of, and optionally
                `decoder_attention_mask` [B, T].
            key: dropout key; None is deterministic.
        """
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        hidden, context = self.run_embed(params, batch, key=keys[0])
        hidden = self.run_blocks(params, hidden, context, key=keys[1])
        return self.run_head(params, hidden, context, key=keys[2])

    def run_embed(
        self, params: Params, batch: Batch, *, key: DropoutKey = None
    ) -> tuple[Float[Array, "B S D"], Context]:
        """The hidden states before the first block, and what all blocks share; runs the encoder."""
        if self.encoder is None:
            return self._embed(params["embed"], batch, key)
        key, encoder_key = (None, None) if key is None else jax.random.split(key)
        hidden, context = self._embed(params["embed"], batch, key)
        of_encoder = {**params["encoder"], "embed": params["embed"]}
        return hidden, dataclasses.replace(context, encoded=self.encoder(of_encoder, batch, key=encoder_key))

    def run_blocks(
        self,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        *,
        key: DropoutKey = None,
    ) -> Any:
        """What `stack` makes of the blocks: by default the hidden states after the last one."""
        return self.stack.run(self, params, hidden, context, key)

    def empty_cache(self, params: Params, hidden: Float[Array, "B S D"], context: Context) -> Cache:
        """A cache for `run_blocks_cached`, without any token in it.

        Args:
            params: as of `__call__`.
            hidden: from `run_embed`; only its shape is read.
            context: with `cache_index`, and `mask` [B, T] for a cache of T slots.
        """
        return self.stack.empty_cache(self, params, hidden, context)

    def run_blocks_cached(
        self, params: Params, hidden: Float[Array, "B S D"], context: Context, cache: Cache
    ) -> tuple[Any, Cache]:
        """As `run_blocks` for S further tokens, and the cache with their keys and values.

        Nothing is differentiated or dropped out.

        Args:
            params: as of `__call__`.
            hidden: the new tokens'.
            context: with `cache_index`, the slot of the first new token, and `mask` [B, T].
            cache: from `empty_cache` or an earlier call.
        """
        return self.stack.run_cached(self, params, hidden, context, cache)

    def layers(self, params: Params, key: DropoutKey = None) -> Layer:
        """What differs between the layers, each leaf stacked [num_layers, ...]: the input of a scan."""
        keys = None if key is None else jax.random.split(key, self.num_layers)
        own = {name: jnp.asarray(values) for name, values in self.per_layer.items()}
        return Layer(params["blocks"], {**own, "layer": jnp.arange(self.num_layers)}, keys)

    def run_layer(
        self, layer: Layer, hidden: Float[Array, "B S D"], context: Context, *, part: Part = "block"
    ) -> Float[Array, "B S D"]:
        """The stream after one layer, or after one of its two parts."""
        hidden = checkpoint_name(stream_on_mesh(hidden, self.mesh), BLOCK_INPUT)
        method, inputs = self._part(layer, hidden, context, part)
        variables = {"params": layer.weights}
        return self.block.apply(variables, *inputs, rngs=dropout_rngs(layer.key), method=method)

    def run_layer_cached(
        self,
        layer: Layer,
        hidden: Float[Array, "B S D"],
        context: Context,
        cache: Cache,
        *,
        part: Part = "block",
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """As `run_layer` for further tokens; the layer writes its own slots of the whole cache."""
        method, inputs = self._part(layer, hidden, context, part)
        variables = {"params": layer.weights, "cache": cache}
        hidden, changed = self.block.apply(variables, *inputs, mutable=["cache"], method=method)
        return hidden, changed.get("cache", cache)

    def checkpointed(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body of a scan over layers under the `remat` policy."""
        name, _ = read_remat(self.remat)
        return (
            body if name == "none" else jax.checkpoint(body, policy=REMAT_POLICIES[name], prevent_cse=False)
        )

    def _part(
        self, layer: Layer, hidden: Array, context: Context, part: Part
    ) -> tuple[str | None, tuple[Any, ...]]:
        """The block's method, and what it takes."""
        if part == "feed_forward":
            return "feed_forward_sublayer", (hidden,)
        method = "attention_sublayer" if part == "attention" else None
        return method, (hidden, dataclasses.replace(context, **layer.own))

    def run_head(
        self,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        *,
        key: DropoutKey = None,
    ) -> Array | Logits:
        """The outputs from the hidden states after the last block."""
        variables = {"params": params["head"]}
        hidden = stream_on_mesh(hidden, self.mesh)
        outputs = self.head.apply(variables, hidden, context, params["embed"], rngs=dropout_rngs(key))
        return logits_on_mesh(outputs, self.mesh)

    def init(self, key: Key[Array, ""], batch: Batch | None = None) -> Params:
        """Random parameters in float32; `batch` gives the inputs' shapes and dtypes, else `example`."""
        batch = self.example if batch is None else batch
        embed_key, block_key, head_key = jax.random.split(key, 3)
        embed = _draw(self.embed, embed_key, batch)
        encoder = {}
        if self.encoder is not None:
            encoder = {"encoder": self.encoder.init(jax.random.fold_in(key, 1), batch)}
            embed = {**encoder["encoder"].pop("embed"), **embed}
        hidden, context = self._block_inputs(embed, batch)
        first = {name: jnp.asarray(values)[0] for name, values in self.per_layer.items()}
        inputs = (hidden, dataclasses.replace(context, **first))
        blocks = jax.vmap(lambda layer_key: _draw(self.block, layer_key, *inputs))(
            jax.random.split(block_key, self.num_layers)
        )
        return {"embed": embed, "blocks": blocks, "head": self.init_head(head_key, embed, batch), **encoder}

    @functools.cached_property
    def shapes(self) -> Params:
        """The shapes and dtypes of what `init` draws, to be read only; found once for a model."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def init_head(self, key: Key[Array, ""], embed: Params, batch: Batch | None = None) -> Params:
        """Random parameters of the head alone; `embed` are the embeddings or their shapes."""
        batch = self.example if batch is None else batch
        return _draw(self.head, key, *self._block_inputs(embed, batch), embed)

    def _block_inputs(self, embed: Params, batch: Batch) -> tuple[Any, Any]:
        """The shapes of what `run_embed` hands to the blocks; an encoder gives the shape it embeds."""
        hidden, context = jax.eval_shape(self._embed, embed, batch)
        if self.encoder is not None:
            context = dataclasses.replace(context, encoded=self.encoder._block_inputs(embed, batch)[0])
        return hidden, context

    def _embed(self, embed: Params, batch: Batch, key: DropoutKey = None) -> tuple[Array, Context]:
        batch = ids_on_mesh(batch, self.mesh)
        hidden, context = self.embed.apply({"params": embed}, batch, rngs=dropout_rngs(key))
        return (embeddings_on_mesh(hidden, self.mesh) if "input_ids" in batch else hidden), context


def _draw(module: Module, key: Key[Array, ""], *inputs: Any) -> Params:
    return module.lazy_init(key, *inputs).get("params", {})
