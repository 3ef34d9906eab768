"""Any adapter that can be merged, as a LoRA: what it changes, weight by weight, at a rank you choose.

    Δ = W' − W = U Σ Vᵀ      a = √Σ_r U_rᵀ      b = √Σ_r V_rᵀ      error = ‖Δ − aᵀb‖ / ‖Δ‖

The best approximation of that rank; exact where the change has no higher one (LoRA itself, PaCA).
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import Array

from peftjax.adapters.arithmetic import as_lora
from peftjax.core import naming, tree
from peftjax.core.errors import PeftError
from peftjax.core.linalg import balanced, svd_of
from peftjax.methods.selection.plain import unfreeze
from peftjax.transform.chain import chain
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.base import dense
from peftjax.weights.canonical import to_canonical
from peftjax.weights.layout import layout_of


@dataclass(frozen=True)
class Converted:
    """A LoRA instead of another adapter.

    Attributes:
        method: `lora`, scale 1; chained with `unfreeze` where other parameters than matrices changed.
        trainable: its trainable; `method.init` on the same base gives the frozen part.
        errors: by path, `‖Δ − aᵀb‖ / ‖Δ‖` over the whole stack.
    """

    method: Transform
    trainable: Trainable
    errors: dict[str, float]


def to_lora(
    method: Transform, frozen: Frozen, trainable: Trainable, *, rank: int, params: Params | None = None
) -> Converted:
    """The LoRA of at most this rank that is closest to an adapter.

    Args:
        method: any that merges.
        frozen: its frozen part.
        trainable: the adapter.
        rank: of every weight; lower where a matrix is smaller.
        params: the base that the LoRA is for; None takes the one in `frozen`. Needed where parameters
            are trained as they are, for then `frozen` does not hold them, and to convert an adapter
            that replaced its base (PiSSA) to one of the original.

    Raises:
        PeftError: the rank is not positive, no weight has changed, the method does not merge or changes
            shapes, or `params` is needed.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.shira(density=0.25, targets=["up"])
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> trainable = jax.tree.map(lambda x: x + 1.0, trainable)
        >>> converted = pj.adapters.to_lora(method, frozen, trainable, rank=4)
        >>> float(converted.errors["up/kernel"]) < 1e-5
        True
    """
    if rank < 1:
        raise PeftError(f"to_lora: rank must be positive, got {rank}")
    bases = tree.named_leaves(method.open(frozen, trainable)[0].params if params is None else params)
    merged = tree.named_leaves(method.merge(frozen, trainable))
    adapted = tree.named_leaves(method.apply(replace(frozen, advanced=True), trainable))
    factors, layouts, errors, plain = {}, {}, {}, {}
    for path, new in merged.items():
        if isinstance(bases[path], tree.Hole):
            raise PeftError(f"to_lora: {path!r} is trained as it is; give the base as params")
        old = dense(bases[path])
        if new.shape != old.shape:
            raise PeftError(
                f"to_lora: {path!r} has shape {list(new.shape)} with the adapter and {list(old.shape)} in "
                "the base, so that there is no difference; give params of the adapted shapes"
            )
        if new is old or bool(jnp.array_equal(new, old)):
            continue
        if not naming.is_weight(path, new):
            plain[path] = new
            continue
        layouts[path] = layout_of(path, adapted, None)
        delta = to_canonical(new.astype(jnp.float32) - old.astype(jnp.float32), layouts[path])
        factors[path], errors[path] = _closest(delta, rank)
    if not factors:
        raise PeftError(f"to_lora: {method.name} has changed no weight")
    method, found = as_lora(factors, layouts)
    if plain:
        method, found = chain(method, unfreeze(list(plain))), {"lora": found, "unfreeze": plain}
    return Converted(method, found, errors)


def _closest(delta: Array, rank: int) -> tuple[tuple[Array, Array], float]:
    """Factors `[*stack, r, in]` and `[*stack, r, out]`, and their relative error."""
    svd = svd_of(delta)
    left = jnp.linalg.norm(svd.sizes[..., rank:]) / jnp.linalg.norm(svd.sizes)
    return balanced(svd, rank), float(left)
