"""A low-rank weight that acts on some tokens alone; the others meet the base."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import primitives
from peftjax.core.errors import PeftError
from peftjax.weights.base import Weight
from peftjax.weights.contraction import Contraction, Dot
from peftjax.weights.fields import shared, static, structured
from peftjax.weights.low_rank import LowRank, Product
from peftjax.weights.sharding import like


@structured
class Activated(LowRank):
    """`y = x·base + active ∘ scale · (x·aᵀ)·b`, with `active` [B, S], True where the factors act.

    The first two free axes of an activation are the batch and its tokens, or the first one is both,
    flattened.

    Attributes:
        active: of the batch at hand; None until `activate_in_model` gives it.
        name: by which it is given.
    """

    has_dense: ClassVar[bool] = False

    active: Array | None = shared(default=None)
    name: str = static(default="")

    def dense(self) -> Array:
        """There is none: tokens that are not active meet another weight."""
        raise PeftError(
            f"{self.layout.name}: an adapter that acts on some tokens alone has no merged weight; run "
            "method.model(model), or train pj.lora instead"
        )

    def supports(self, rule: Contraction) -> bool:
        """Products of one matrix."""
        return isinstance(rule, Dot) and not rule.w_batch and not self.layout.stack and super().supports(rule)

    def _enter(self, product: Product, x: Array, first: Array) -> Array:
        """`x·first`, zero where the token is not active."""
        z = super()._enter(product, x, first)
        return jnp.where(like(self._of_rows(z), z), z, jnp.zeros((), z.dtype))

    def _of_rows(self, z: Array) -> Array:
        """`active` with the axes of z, whose last is the rank."""
        if self.active is None:
            raise PeftError(
                f"{self.layout.name}: it is not known which tokens are active; run method.model(model)"
            )
        batch, tokens = self.active.shape
        if z.shape[:2] == (batch, tokens) and z.ndim > 2:
            return self.active.reshape(batch, tokens, *(1,) * (z.ndim - 2))
        if z.shape[0] == batch * tokens:
            return self.active.reshape(batch * tokens, *(1,) * (z.ndim - 1))
        raise PeftError(
            f"{self.layout.name}: it is known which of {batch} x {tokens} tokens are active, and this layer "
            f"sees {z.shape[:-1]}; let it see them all (feed_forward_tile=None), or exclude it"
        )


def activated(weight: LowRank, name: str) -> Activated:
    """A low-rank weight that is to act on some tokens alone, which `name` tells."""
    return Activated(**{field.name: getattr(weight, field.name) for field in fields(LowRank)}, name=name)


def with_active(w: Any, active: Array, name: str) -> Any:
    """A weight whose factors of that name, and those inside it, act on these tokens."""
    if not isinstance(w, Weight):
        return w
    changes: dict[str, Any] = {}
    if isinstance(w.base, Weight):
        changes["base"] = with_active(w.base, active, name)
    if isinstance(w, Activated) and w.name == name:
        changes["active"] = active
    return replace(w, **changes) if changes else w


def _itself(w: Array, active: Array, *, name: str) -> list[Array]:
    return [w]


def _differentiable(moving: Sequence[bool], arrays: Sequence[Array], *, name: str) -> Any:
    return lambda *moved: list(moved[:1]) if moving[0] else [arrays[0]]


def _mapped(arrays: Sequence[Array], axes: Sequence[int | None], *, name: str) -> list[Array]:
    (w, active), (of_w, of_active) = arrays, axes
    if of_w is None:
        return [jnp.broadcast_to(w, (active.shape[of_active or 0], *w.shape))]
    return [jnp.moveaxis(w, of_w, 0)]


def _on_weights(evaluator: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    w, active = operands
    return [with_active(w, active, eqn.params["name"])]


_activate = primitives.one_equation("activate", _itself, _differentiable, _mapped, _on_weights)


def activate_in_model(params: Mapping[str, Any], active: Array, name: str) -> Any:
    """In a model that `peftjax.adapt` runs: `params` whose weights of that name act on these tokens.

    To a model it is the same parameters.
    """
    return jax.tree.map(lambda w: _activate(w, active, name=name)[0], params)
