"""Which expert takes which token, and the way of the tokens to their experts and back.

Pairs of a token and one of its experts are rows, sorted by expert. On a mesh every device sorts its own:

    experts   whole ones over `expert` and `tensor`, E / P each
    tokens    those of the P devices of `expert` are gathered there; over `tensor` all have the same ones
    rows      of a device: the pairs with its own experts, then pairs with others, whose products are zero
    results   summed over the devices that share tokens, each taking its own back (a reduce-scatter)

so that no matrix of an expert passes between devices of these axes, and every pair is computed, however
the tokens are distributed: there is no capacity beyond which one is left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from peftjax.backbone.block_config import Experts
from peftjax.backbone.on_mesh import row_and_token_axes
from peftjax.core import compat
from peftjax.core.mesh_axes import EXPERTS, dividing


@dataclass(frozen=True)
class Division:
    """How a mesh divides the tokens and the experts of a layer.

    Attributes:
        mesh: of the activations.
        of_rows: the axes of the batch's rows.
        of_tokens: the axes of the tokens of each row.
        of_experts: the axes of the experts.
    """

    mesh: Mesh
    of_rows: tuple[str, ...]
    of_tokens: tuple[str, ...]
    of_experts: tuple[str, ...]

    @property
    def tokens(self) -> PartitionSpec:
        """Where tokens [B, S, ...] lie."""
        return PartitionSpec(self.of_rows, self.of_tokens)

    @property
    def experts(self) -> PartitionSpec:
        """Where arrays of the experts [E, ...] lie."""
        return PartitionSpec(self.of_experts)

    @property
    def pairs(self) -> PartitionSpec:
        """Where what a device has of its own pairs lies, that of all devices one behind another."""
        axes = (*self.of_rows, *self.of_tokens)
        return PartitionSpec((*axes, *(axis for axis in self.of_experts if axis not in axes)))

    @property
    def gathered(self) -> tuple[str, ...]:
        """The axes of experts over which tokens are divided, and gathered."""
        return tuple(axis for axis in self.of_experts if axis in (*self.of_rows, *self.of_tokens))

    @property
    def shared(self) -> tuple[str, ...]:
        """The axes of experts whose devices have the same tokens."""
        return tuple(axis for axis in self.of_experts if axis not in self.gathered)

    def devices(self, axes: Sequence[str]) -> int:
        """How many devices lie along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def division(mesh: Mesh | None, tokens: Sequence[int], experts: int) -> Division | None:
    """Of tokens [B, S, ...] and so many experts; None where there is no mesh."""
    if mesh is None:
        return None
    of_rows, of_tokens = row_and_token_axes(*tokens[:2], mesh)
    return Division(mesh, of_rows, of_tokens, dividing(experts, EXPERTS, mesh.shape))


def on_each_device(f: Callable[..., Any], over: Division | None, ins: Any, outs: Any) -> Callable[..., Any]:
    """A function as the own code of each device; with no division as it is."""
    return f if over is None else jax.shard_map(f, mesh=over.mesh, in_specs=ins, out_specs=outs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """The rows of a layer: n of the B S k pairs of a token and an expert of it; on a mesh, n of each device.

    Attributes:
        coefficients: of each token's experts, the largest first.
        order: the rows' pairs, as they are numbered token by token.
        places: the pairs' rows; of one without, a number from n on.
        experts: the rows' experts, ascending; on a mesh numbered from the device's first, and E / P of a pair
            with another device's.
        sizes: how many rows each expert has.
        over: how a mesh divides them.
    """

    coefficients: Float[Array, "B S k"]
    order: Int[Array, " n"]
    places: Int[Array, " BSk"]
    experts: Int[Array, " n"]
    sizes: Int[Array, " E"]
    over: Division | None = field(default=None, metadata={"static": True})

    def rows(self, x: Float[Array, "B S D"]) -> Float[Array, "n D"]:
        """Each row's token."""
        chosen = self.coefficients.shape[-1]

        def own(x: Array, order: Array) -> Array:
            x = _tokens_of_all(x, self.over)
            each = jnp.broadcast_to(x[:, None], (len(x), chosen, x.shape[-1]))
            return _permuted(each.reshape(-1, x.shape[-1]), order)

        return self._by_pairs(own, x)(x, self.order)

    def row_coefficients(self) -> Float[Array, "n 1"]:
        """Each row's coefficient."""

        def own(coefficients: Array, order: Array) -> Array:
            return _permuted(_tokens_of_all(coefficients, self.over).reshape(-1, 1), order)

        return self._by_pairs(own, self.coefficients)(self.coefficients, self.order)

    def tokens(self, rows: Float[Array, "n D"]) -> Float[Array, "B S D"]:
        """The sum of each token's rows."""
        over, (*_, chosen) = self.over, self.coefficients.shape

        def own(rows: Array, places: Array, coefficients: Array) -> Array:
            beyond = {"mode": "promise_in_bounds"} if over is None else {"mode": "fill", "fill_value": 0}
            pairs = rows.at[places].get(unique_indices=True, **beyond)
            sums = pairs.reshape(-1, chosen, rows.shape[-1]).sum(1)
            if over is not None and over.shared:
                sums = lax.psum(sums, over.shared)
            if over is not None and over.gathered:
                sums = lax.psum_scatter(sums, over.gathered, scatter_dimension=0, tiled=True)
            return sums.reshape(*coefficients.shape[:-1], rows.shape[-1])

        pairs, tokens = (None, None) if over is None else (over.pairs, over.tokens)
        return on_each_device(own, over, (pairs, pairs, tokens), tokens)(rows, self.places, self.coefficients)

    def by_row(self, f: Callable[..., Array], *rows: Array, weights: Sequence[Array] = ()) -> Array:
        """`f(rows, weights, experts, sizes)`, a function of each row and its expert's weights [E, ...].

        Args:
            f: of lists of arrays, those of a device where there is a mesh.
            rows: arrays [n, ...]
            weights: arrays [E, ...].
        """
        specs: Any = (None,) * 4
        if self.over is not None:
            pairs = self.over.pairs
            specs = [pairs] * len(rows), [self.over.experts] * len(weights), pairs, pairs
        out = None if self.over is None else self.over.pairs
        return on_each_device(f, self.over, specs, out)(list(rows), list(weights), self.experts, self.sizes)

    def _by_pairs(self, own: Callable[..., Array], tokens: Array) -> Callable[..., Array]:
        if self.over is None:
            return own
        return on_each_device(own, self.over, (self.over.tokens, self.over.pairs), self.over.pairs)


def routed(
    logits: Float[Array, "B S E"], experts: Experts, dtype: DTypeLike, mesh: Mesh | None = None
) -> Routing:
    """The `experts.chosen` experts with the largest logits, and the softmax there, in float32."""
    over = division(mesh, logits.shape, experts.count)

    def own(logits: Array) -> tuple[Array, ...]:
        logits = logits.astype(jnp.float32)
        largest, numbers = lax.top_k(logits, experts.chosen)
        beyond = largest if experts.normalized else logits
        coefficients = jnp.exp(largest - jax.nn.logsumexp(beyond, axis=-1, keepdims=True))
        return coefficients.astype(dtype), *_sorted(experts.count, over, numbers)

    ins, outs = (None, None) if over is None else (over.tokens, (over.tokens, *(over.pairs,) * 4))
    return Routing(*on_each_device(own, over, ins, outs)(logits), over)


def _sorted(count: int, over: Division | None, numbers: Int[Array, "B S k"]) -> tuple[Array, ...]:
    """Order, places, experts and sizes, of a device's own experts on a mesh."""
    chosen = numbers.shape[-1]
    flat = _tokens_of_all(numbers, over).reshape(-1)
    if over is not None and over.of_experts:
        count //= over.devices(over.of_experts)
        flat = flat - lax.axis_index(over.of_experts) * count
        flat = jnp.where((flat >= 0) & (flat < count), flat, count)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=count + 1)[:count]
    # A token has no more rows on a device than there are experts.
    rows = order[: len(flat) // chosen * min(chosen, count)]
    return rows, jnp.argsort(order), flat[rows], sizes


def _tokens_of_all(x: Array, over: Division | None) -> Array:
    """What tokens [B, S, ...] have, [T, ...] of all devices that share experts."""
    x = x.reshape(-1, x.shape[-1])
    if over is None:
        return x
    if over.gathered:
        x = lax.all_gather(x, over.gathered, tiled=True)
    # Cast before each token is repeated: its gradient is then summed over the devices.
    return compat.made_to_vary(x, frozenset(over.shared))


def _permuted(rows: Array, order: Int[Array, " n"]) -> Array:
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")
