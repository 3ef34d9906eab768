"""Any optax transformation with its moments in eight bits.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv 2110.02861. Around a
transformation with state s and moments m in it, between steps only codes are kept (see `quantize.blockwise`):

    u_t, s_t = tx.update(g_t, decode(s̃_{t-1}), w_t)      s̃_t = encode(s_t)

The step itself uses the new moments before they are coded, as the release does. A moment of N numbers takes
N + 4 N / block bytes instead of 4 N: AdamW's state 2.03 bytes a parameter instead of 8.

Differences from the release: blocks of at most 256 numbers lie within a row of the last axis (the release
cuts the flattened array), the scale of a first moment has a sign, and a second moment that is not zero is
never coded as zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from peftjax.core.checks import at_least, one_of
from peftjax.core.errors import PeftError
from peftjax.optim.coded_sharding import shardings_like
from peftjax.optim.elementwise import is_elementwise
from peftjax.optim.rounding_noise import uniform
from peftjax.optim.slicewise import Cut, Leaves, cut_of, run_slicewise
from peftjax.optim.updates import is_placeholder
from peftjax.quantize import Codes, decode
from peftjax.quantize.blockwise import encode
from peftjax.transform.moment_fields import Kind, Kinds, field_of, kind_of, parameter_of


class EightBitState(NamedTuple):
    """The state of `eight_bit`; `inner` is the transformation's, with a `Codes` for each coded moment."""

    step: Int[Array, ""]
    key: Key[Array, ""] | None
    inner: optax.OptState


def eight_bit(
    tx: optax.GradientTransformation,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    key: Key[Array, ""] | None = None,
    moments: Kinds = kind_of,
    slice_size: int = 2**24,
) -> optax.GradientTransformationExtraArgs:
    """Keep the moments of a transformation as codes of eight bits.

    Coded are the float arrays of at least `min_size` numbers that mirror a parameter (their path in the state
    ends in its path), in a field that `moments` knows. The field's name alone decides between the map of
    first moments and that of second moments, which are never negative; `moment_fields.kind_of` has the names.
    All else of the state is kept as it is.

    `tx` computes in float32: gradients, parameters and moments of fewer bits are given to it in float32, and
    its updates return in the gradients' dtypes. On float32 parameters, what is not coded is bit for bit as
    without the wrapper.

    Of an elementwise `tx` (Adam, Lion, momentum and most others; found out from its jaxpr), parameters of
    more than `slice_size` numbers are updated slice by slice in a loop, so that no more than one slice's
    moments are decoded at once. Others (Adafactor, LAMB, clipping by the global norm) run on the whole tree:
    XLA then holds a decoded array at a time or more. So put what is not elementwise outside:
    `optax.chain(optax.clip_by_global_norm(1.0), eight_bit(optax.adamw(1e-4)))`. The leading axis of a stack
    `[L, in, out]` that is cut should not be sharded: its slices would move between devices.

    Args:
        tx: any transformation; inside `chain`, `masked`, `MultiSteps`, `inject_hyperparams`, or around them.
        block_size: most numbers per scale; 256 as in the release (the paper: 2048).
        min_size: smaller arrays stay as they are; 4096 as in the release.
        key: round stochastically, with noise from this key, the step and the moment's place in the state;
            kept in the state. Without it, to the nearest.
        moments: `'ScaleByAdamState.nu' -> 'signed' | 'unsigned' | 'keep'`, for states with other names.
        slice_size: numbers of a parameter that are updated at once.

    Raises:
        PeftError: block_size is less than 2; in `init`, when no large array of the state is a known moment,
            or `moments` gives something else.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.eight_bit(optax.adamw(1e-2))
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    at_least("eight_bit", "block_size", block_size, 2)
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> EightBitState:
        if is_placeholder(params):
            return EightBitState(jnp.zeros((), jnp.int32), key, tx.init(params))
        kinds = _kinds(jax.eval_shape(tx.init, _wide_shapes(params)), params, min_size, moments)

        def start(params: Any) -> EightBitState:
            state = tx.init(_wide(params))
            coded = [
                leaf if kind == "keep" else encode(leaf, signed=kind == "signed", block_size=block_size)
                for leaf, kind in zip(jax.tree.leaves(state), kinds)
            ]
            return EightBitState(
                jnp.zeros((), jnp.int32), key, jax.tree.unflatten(jax.tree.structure(state), coded)
            )

        # Compiled, so that the float32 moments never exist as a whole.
        shardings = shardings_like(jax.eval_shape(start, params), params)
        return jax.jit(start, out_shardings=shardings)(params)

    def update(
        updates: Any, state: EightBitState, params: Any = None, **extra: Any
    ) -> tuple[Any, EightBitState]:
        outer, inner = jax.tree.structure(updates), jax.tree.structure(state.inner, is_leaf=_is_codes)

        def run(updates: Leaves, coded: Leaves, params: Leaves | None) -> tuple[Leaves, Leaves]:
            """A step in float32, on trees as lists of leaves, the moments decoded."""
            wide = None if params is None else outer.unflatten(map(_wide, params))
            moved, new = tx.update(
                outer.unflatten(map(_wide, updates)), inner.unflatten(_decoded(coded)), wide, **extra
            )
            return outer.flatten_up_to(moved), inner.flatten_up_to(new)

        def step(
            updates: Leaves, coded: Leaves, params: Leaves | None, noise: Key[Array, ""] | None
        ) -> tuple[Leaves, Leaves]:
            moved, new = run(updates, coded, params)
            moved = [leaf.astype(old.dtype) for leaf, old in zip(moved, updates)]
            return moved, _coded_like(coded, new, block_size, noise)

        leaves = (
            outer.flatten_up_to(updates),
            inner.flatten_up_to(state.inner),
            None if params is None else outer.flatten_up_to(params),
        )
        noise = None if state.key is None else jax.random.fold_in(state.key, state.step)
        owners, cuts = _cuts(updates, state.inner, slice_size)
        is_cut = any(cut.parts > 1 for cut in cuts) and all(jnp.size(x) == 1 for x in jax.tree.leaves(extra))
        if is_cut and is_elementwise(run, *jax.eval_shape(_decoded, leaves)):
            moved, new = run_slicewise(step, *leaves, noise, owners=owners, cuts=cuts)
        else:
            moved, new = step(*leaves, noise)
        return outer.unflatten(moved), EightBitState(state.step + 1, state.key, inner.unflatten(new))

    return optax.GradientTransformationExtraArgs(init, update)


def _decoded(tree: Any) -> Any:
    return jax.tree.map(decode, tree, is_leaf=_is_codes)


def _coded_like(old: Leaves, new: Leaves, block_size: int, key: Key[Array, ""] | None) -> Leaves:
    """The new leaves of the state, with codes where the old ones are."""
    coded = []
    for place, (before, leaf) in enumerate(zip(old, new)):
        if _is_codes(before):
            noise = None if key is None else uniform(jax.random.fold_in(key, place), leaf.shape)
            leaf = encode(leaf, signed=before.signed, block_size=block_size, noise=noise)
        coded.append(leaf)
    return coded


def _cuts(updates: Any, state: Any, slice_size: int) -> tuple[list[int | None], list[Cut]]:
    """Whose leading axis each leaf of the state has, and how each parameter's is cut.

    A parameter is not cut where something of its state has another shape, or codes that lie across the axis.
    """
    known = {path: (n, leaf) for n, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(updates))}
    cuts = [cut_of(leaf.shape, slice_size) for _, leaf in known.values()]
    owners: list[int | None] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_codes):
        place, like = known.get(parameter_of(path, known), (None, None))
        owners.append(place)
        across = _is_codes(leaf) and leaf.merged == len(leaf.shape)
        if place is not None and (leaf.shape != like.shape or across):
            cuts[place] = Cut()
    return owners, cuts


def _kinds(state: Any, params: Any, min_size: int, moments: Kinds) -> list[Kind]:
    """Of every leaf of the state, in tree order."""
    known = {tuple(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kinds, others = [], set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        field = None
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size >= min_size and leaf.ndim:
            field = field_of(state, path, known) or jax.tree_util.keystr(path)
        kind = "keep" if field is None else moments(field)
        one_of("eight_bit", f"moments({field!r})", kind, ("signed", "unsigned", "keep"))
        kinds.append(kind)
        if field is not None and kind == "keep":
            others.add(field)
    if others and all(kind == "keep" for kind in kinds):
        raise PeftError(
            "eight_bit: no large array of the state is a moment that it knows, only "
            f"{', '.join(sorted(others))}; say with moments= which are 'signed' and which 'unsigned'"
        )
    return kinds


def _is_codes(node: Any) -> bool:
    return isinstance(node, Codes)


def _wide(tree: Any) -> Any:
    """Floats of fewer than 32 bits in float32, all else as it is."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _is_narrow(leaf) else leaf, tree)


def _wide_shapes(tree: Any) -> Any:
    return jax.eval_shape(_wide, tree)


def _is_narrow(leaf: Float[Array, "..."]) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
