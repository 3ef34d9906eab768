"""Activations of a backbone's blocks rounded to codes of a few bits, as integer products take them.

Papers: Li et al., "RepQ-ViT", ICCV 2023, arXiv 2212.08254; Li et al., "RepQuant", 2024, arXiv 2402.05628.

    x -> s (clip(round(x / s) + z, 0, 2^b - 1) - z)                  what enters a linear layer
    a -> s 2^(-q/2),  q = clip(round(-2 log2(a / s)), 0, 2^b - 1)    attention's weights; the last q is for 0

With `ranges`, of `pj.calibrate`, s and z are fixed numbers of each layer. Without, an input has s =
c · max|x| / (2^(b-1) - 1) of each token and no z, and attention's weights have s = 1 where they are rounded.
Gradients are straight through; what is cut off has none.

It goes beside a method: `pj.chain(pj.quantized(), pj.rounded_activations(), pj.lora())`. Trained: nothing, or
with `train` both ends of each range. Backward keeps what the model keeps.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.rewriting import add_to_blocks, require_one_stack, rewrite_stacks, stacks_of
from peftjax.backbone.rounding import INPUTS, WEIGHTS, Rounding
from peftjax.core.checks import positive_share
from peftjax.core.errors import PeftError
from peftjax.quantize.activations import LogSqrt2, Uniform, moved_ends, require_bits
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform

_NAME = "rounded_activations"
_UNDER = "rounding"
_WHY = "its two stacks have no ranges in common"


@register(
    kind="companion",
    paper="RepQ-ViT, Li et al. 2023, arXiv 2212.08254",
    trains="nothing; with `train` both ends of each range",
    backward_keeps="nothing more",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(starts_as_base=False),
)
def rounded_activations(
    *,
    bits: int | None = None,
    weight_bits: int | None = None,
    ranges: Mapping[str, Any] | None = None,
    clip: float | None = None,
    train: bool = False,
) -> Transform:
    """Round what enters the linear layers of the blocks, and attention's weights (arXiv 2212.08254).

    Args:
        bits: of what enters linear layers, 2 to 8; by default those of `ranges`, else 8.
        weight_bits: of attention's weights, by default those of `ranges`; else they are not rounded. Codes of
            many bits reach further down, and are no closer to each other.
        ranges: those that `pj.calibrate.activation_ranges` or `reparameterize` gives, of which a model of
            fewer layers takes the first. None has a range for each token.
        clip: c, the share of a token's largest size at which it is cut off, by default all of it.
        train: train both ends of the ranges of what enters linear layers; `learned_ranges` gives those then.

    Raises:
        PeftError: for `train` without ranges, or `clip` with some; for bits out of range, or other than those
            of `ranges`; for ranges that are not those of a backbone; in `init` and `model`, when it is not a
            backbone of one stack, or one of other sizes.
    """
    known = None if ranges is None else _read(ranges)
    rounding = _rounding(bits, weight_bits, known)
    positive_share(_NAME, "clip", clip)
    if clip is not None and known is not None:
        raise PeftError(f"{_NAME}: clip is of ranges of tokens; leave it out, for `ranges` are known numbers")
    if train and known is None:
        raise PeftError(f"{_NAME}: train moves known ranges; give those of pj.calibrate.activation_ranges")

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        require_one_stack(_NAME, params, _WHY)
        (stack,) = stacks_of(_NAME, params)
        if known is None:
            state = {name: {"share": jnp.full(stack.num_layers, clip or 1.0)} for name in INPUTS}
        else:
            _require_sizes(known, params, stack.num_layers)
            state = {name: _arrays(own, stack.num_layers) for name, own in known.items()}
        ends = {name: _no_move(state[name]) for name in INPUTS} if train else {}
        return Frozen(params, _by_path(state)), _by_path(ends)

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        moved = {name: _arrays(own) for name, own in _moved(frozen, trainable, rounding)}
        return add_to_blocks(_UNDER, frozen.params, {"blocks": {**_by_name(frozen.state), **moved}})

    def model(forward: Forward) -> Forward:
        def rewrite(backbone: Backbone) -> Backbone:
            require_one_stack(_NAME, backbone, _WHY)
            block = backbone.block
            return dataclasses.replace(
                backbone, block=block.clone(config=dataclasses.replace(block.config, rounding=rounding))
            )

        return rewrite_stacks(_NAME, forward, rewrite)

    config = {} if known is None else {"ranges": {name: _written(own) for name, own in known.items()}}
    return Transform(_NAME, config, init, apply, model)


def learned_ranges(
    ranges: Mapping[str, Uniform | LogSqrt2], frozen: Frozen, trainable: Trainable
) -> dict[str, Uniform | LogSqrt2]:
    """The ranges that `rounded_activations(ranges=ranges, train=True)` has trained.

    Args:
        ranges: what it was given.
        frozen: of that method.
        trainable: what it has trained.
    """
    return {**ranges, **dict(_moved(frozen, trainable, _rounding(None, None, ranges)))}


def _moved(frozen: Frozen, trainable: Trainable, rounding: Rounding) -> Iterator[tuple[str, Uniform]]:
    """The ranges whose ends are trained."""
    state = _by_name(frozen.state)
    for name, ends in _by_name(trainable).items():
        start = Uniform(state[name]["scale"], state[name].get("zero"), rounding.bits)
        yield name, moved_ends(start, ends.get("low"), ends["high"])


def _no_move(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """What moves the ends of a range, where they stay."""
    ends = {"high": jnp.zeros_like(arrays["scale"])}
    return {**ends, "low": jnp.zeros_like(arrays["zero"])} if "zero" in arrays else ends


def _by_path(named: Mapping[str, Any]) -> dict[str, Any]:
    return {f"blocks/{_UNDER}/{name}": own for name, own in named.items()}


def _by_name(by_path: Mapping[str, Any]) -> dict[str, Any]:
    return {path.rsplit("/", 1)[-1]: own for path, own in by_path.items()}


def _rounding(
    bits: int | None, weight_bits: int | None, known: Mapping[str, Uniform | LogSqrt2] | None
) -> Rounding:
    """The bits that are given, or those of the ranges."""
    given = {"bits": bits, "weight_bits": weight_bits}
    of_ranges: dict[str, int | None] = {"bits": 8, "weight_bits": None}
    if known is not None:
        found = {known[name].bits for name in INPUTS}
        if len(found) > 1:
            raise PeftError(f"{_NAME}: the ranges are of {sorted(found)} bits; give those of one calibration")
        of_ranges = {"bits": found.pop(), "weight_bits": known[WEIGHTS].bits if WEIGHTS in known else None}
    for name, value in given.items():
        if value is not None:
            require_bits(_NAME, name, value)
        if known is not None and value not in (None, of_ranges[name]):
            raise PeftError(
                f"{_NAME}: {name} is {value}, and the ranges are of {of_ranges[name]}; calibrate with "
                f"{name}={value}"
            )
    return Rounding(**{name: of_ranges[name] if value is None else value for name, value in given.items()})


def _read(ranges: Mapping[str, Any]) -> dict[str, Uniform | LogSqrt2]:
    """Ranges as they are, or as `_written` writes them."""
    if set(ranges) - {WEIGHTS} != set(INPUTS):
        raise PeftError(
            f"{_NAME}: ranges are of {', '.join(INPUTS)} and perhaps {WEIGHTS}, not of "
            f"{', '.join(map(str, ranges))}; give those of pj.calibrate.activation_ranges"
        )
    return {name: _read_one(name, own) for name, own in ranges.items()}


def _read_one(name: str, own: Any) -> Uniform | LogSqrt2:
    kind = LogSqrt2 if name == WEIGHTS else Uniform
    if isinstance(own, Mapping):
        fields = ("scale",) if kind is LogSqrt2 else ("scale", "zero")
        try:
            arrays = [None if own.get(f) is None else jnp.asarray(own[f], jnp.float32) for f in fields]
        except (TypeError, ValueError) as error:
            raise PeftError(f"{_NAME}: the range of {name!r} has no numbers: {error}") from error
        own = kind(*arrays, own.get("bits"))
    if not isinstance(own, kind):
        raise PeftError(f"{_NAME}: the range of {name!r} is no {kind.__name__}")
    require_bits(_NAME, f"bits of {name!r}", own.bits)
    shapes = {jnp.shape(array) for array in _arrays(own).values()}
    if own.scale is None or len(shapes) != 1 or len(shapes.pop()) not in (1, 2):
        raise PeftError(f"{_NAME}: the range of {name!r} is of no layers; give [L] or [L, D] numbers")
    return own


def _written(own: Uniform | LogSqrt2) -> dict[str, Any]:
    """A range as a file has it."""
    return {"bits": own.bits, **{name: array.tolist() for name, array in _arrays(own).items()}}


def _arrays(own: Uniform | LogSqrt2, layers: int | None = None) -> dict[str, Array]:
    """The arrays of a range, of the first layers."""
    arrays = {"scale": own.scale, "zero": getattr(own, "zero", None)}
    return {name: array[:layers] for name, array in arrays.items() if array is not None}


def _require_sizes(known: Mapping[str, Uniform | LogSqrt2], params: Params, layers: int) -> None:
    """Raise a PeftError for ranges of fewer layers, or of another number of channels."""
    width = params["blocks"]["attention_norm"]["scale"].shape[-1]
    for name, own in known.items():
        shape = jnp.shape(own.scale)
        if shape[0] < layers or (name in ("attention", "feed_forward") and shape[1:] not in ((), (width,))):
            raise PeftError(
                f"{_NAME}: the range of {name!r} is of {list(shape)} layers and channels, the model has "
                f"{layers} layers of {width}; calibrate this model"
            )
