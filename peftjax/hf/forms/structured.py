"""PEFT's files of the methods in `peftjax/methods/structured`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, Seed, no_dropout, rank_of
from peftjax.hf.forms.form import Arrays, Form, SlotForm, SlotForms, column, negative, row, same, transposed
from peftjax.methods.structured.glora import Coupling, OfBiases, OfWeights
from peftjax.methods.structured.peanut import Activation, layers_at


@dataclass(frozen=True)
class _Ia3:
    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True


def _sides(slots: SlotForms, tensors: Arrays) -> list[str]:
    return ["input" if tensors["ia3_l"].shape[0] == 1 else "output"]


def _entering(paths: Mapping[str, Arrays]) -> list[str]:
    return [path for path, arrays in paths.items() if "input" in arrays]


IA3 = Form(
    "ia3",
    "IA3",
    {"output": column("ia3_l"), "input": row("ia3_l")},
    _Ia3,
    present=_sides,
    of_modules=lambda modules: {"feedforward_modules": sorted(_entering(modules))},
    of_paths=lambda paths: {"inputs": "|".join(map(re.escape, _entering(paths))) or None},
)


@dataclass(frozen=True)
class _Loha:
    r: Count = 8
    alpha: float = 8.0
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True


def _loha_options(fields: _Loha) -> dict[str, Any]:
    no_dropout(fields, "rank_dropout", "module_dropout")
    return {}


LOHA = Form(
    "loha",
    "LOHA",
    {
        "a1": same("hada_w1_b"),
        "b1": transposed("hada_w1_a"),
        "a2": same("hada_w2_b"),
        "b2": transposed("hada_w2_a"),
    },
    _Loha,
    to_options=_loha_options,
    rank=rank_of("a1"),
    alpha=("alpha", "alpha_pattern"),
)


@dataclass(frozen=True)
class _Hira:
    r: Count = 32
    rank_pattern: dict[str, Count] | None = None
    hira_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True


HIRA = Form(
    "hira",
    "HIRA",
    {"a": same("hira_A"), "b": transposed("hira_B")},
    _Hira,
    lambda options: {"hira_dropout": options["dropout"]},
    lambda fields: {"dropout": fields.hira_dropout},
    rank=rank_of("a"),
)


@dataclass(frozen=True)
class _Miss:
    r: Count = 64
    mini_r: Count = 1
    miss_dropout: Rate = 0.0
    init_weights: bool | str = True


def _miss_options(fields: _Miss) -> dict[str, Any]:
    width = fields.mini_r if fields.init_weights == "mini" else None
    return {"dropout": fields.miss_dropout, "width": width}


MISS = Form(
    "miss",
    "MISS",
    {"block": same("miss_block")},
    _Miss,
    lambda options: (
        {"miss_dropout": options["dropout"]}
        | ({} if options["width"] is None else {"mini_r": options["width"], "init_weights": "mini"})
    ),
    _miss_options,
    rank=rank_of("block"),
)


@dataclass(frozen=True)
class _Oft:
    r: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    oft_block_size: Annotated[int, Meta(ge=0, le=1_000_000)] = 32
    module_dropout: Rate = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Count = 5
    fan_in_fan_out: bool = False
    init_weights: bool = True


def _oft_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    values = {"r": 0, "oft_block_size": options["block"], "block_share": options["shared"]}
    values |= {"use_cayley_neumann": options["terms"] is not None, "coft": options["radius"] is not None}
    values |= {} if options["terms"] is None else {"num_cayley_neumann_terms": options["terms"]}
    return values | ({} if options["radius"] is None else {"eps": options["radius"]})


def _oft_options(fields: _Oft) -> dict[str, Any]:
    no_dropout(fields, "module_dropout")
    return {
        "terms": fields.num_cayley_neumann_terms if fields.use_cayley_neumann else None,
        "shared": fields.block_share,
        "radius": fields.eps if fields.coft else None,
    }


def _size_of_skew(entries: np.ndarray) -> int:
    """B by the b(b - 1)/2 entries of a block."""
    return round((1 + (1 + 8 * entries.shape[-1]) ** 0.5) / 2)


OFT = Form(
    "oft",
    "OFT",
    {"skew": same("oft_R.weight")},
    _Oft,
    _oft_fields,
    _oft_options,
    # PEFT's exact rotation turns the other way than its series.
    with_fields=lambda slots, fields: (
        slots if fields.use_cayley_neumann else {"skew": negative(slots["skew"])}
    ),
    of_arrays=lambda arrays: {"block": _size_of_skew(arrays["skew"])},
)


@dataclass(frozen=True)
class _Lokr:
    r: Count = 8
    alpha: float = 8.0
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout: Rate = 0.0
    rank_dropout_scale: bool = False
    module_dropout: Rate = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True


def _lokr_options(fields: _Lokr) -> dict[str, Any]:
    no_dropout(fields, "rank_dropout", "module_dropout")
    factor = fields.decompose_factor if fields.decompose_factor > 0 else None
    return {"factor": factor, "decompose_both": fields.decompose_both}


def _parts_of(slots: SlotForms, tensors: Arrays) -> list[str]:
    """Either of the two matrices whole, or both of its factors."""
    first = ["w1"] if "lokr_w1" in tensors else ["a1", "b1"]
    return [*first, *(["w2"] if "lokr_w2" in tensors else ["a2", "b2"])]


def _lokr_rank(arrays: Arrays) -> int | None:
    return next((len(arrays[slot]) for slot in ("a1", "a2") if slot in arrays), None)


LOKR = Form(
    "lokr",
    "LOKR",
    {
        "w1": transposed("lokr_w1"),
        "a1": same("lokr_w1_b"),
        "b1": transposed("lokr_w1_a"),
        "w2": transposed("lokr_w2"),
        "a2": same("lokr_w2_b"),
        "b2": transposed("lokr_w2_a"),
    },
    _Lokr,
    lambda options: {
        "decompose_factor": -1 if options["factor"] is None else options["factor"],
        "decompose_both": options["decompose_both"],
    },
    _lokr_options,
    rank=_lokr_rank,
    alpha=("alpha", "alpha_pattern"),
    present=_parts_of,
)


@dataclass(frozen=True)
class _Hra:
    r: Count = 8
    apply_GS: bool = False
    init_weights: bool = True


def _no_start(start: np.ndarray) -> np.ndarray:
    """Raise a PeftError for reflections of the start, which PEFT's files have not."""
    if start.any():
        raise PeftError(
            "hra: with `orthogonal` the weights are reflected back in the directions of the start, which "
            "PEFT's HRA does not do; merge the adapter instead of exporting it"
        )
    return start.T


HRA = Form(
    "hra",
    "HRA",
    # The start first: the directions are written over it.
    {"start": SlotForm("hra_u", _no_start, lambda u: np.zeros_like(u.T)), "u": transposed("hra_u")},
    _Hra,
    lambda options: {"apply_GS": options["orthogonal"]},
    lambda fields: {"orthogonal": fields.apply_GS},
    rank=rank_of("u"),
    bias="hra_only",
    with_fields=lambda slots, fields: slots if fields.apply_GS else {"u": slots["u"]},
)


@dataclass(frozen=True)
class _Road:
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Count = 64
    init_weights: bool = True


ROAD = Form(
    "road",
    "ROAD",
    {"theta": same("road_theta"), "alpha": same("road_alpha")},
    _Road,
    lambda options: {"variant": f"road_{options['variant']}", "group_size": options["group"]},
    lambda fields: {"variant": int(fields.variant.removeprefix("road_")), "group": fields.group_size},
)


@dataclass(frozen=True)
class _Boft:
    boft_block_size: Annotated[int, Meta(ge=0, le=1_000_000)] = 4
    boft_block_num: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    boft_n_butterfly_factor: Count = 1
    boft_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True


def _boft_options(fields: _Boft) -> dict[str, Any]:
    no_dropout(fields, "boft_dropout")
    return {}


def _whole_skew(entries: np.ndarray) -> np.ndarray:
    """PEFT's matrices, of which it takes the skew part, and which turn the other way."""
    size = _size_of_skew(entries)
    upper = np.zeros((*entries.shape[:-1], size, size), entries.dtype)
    upper[..., *np.triu_indices(size, 1)] = -entries
    return upper - _transposed(upper)


def _entries_of_skew(whole: np.ndarray) -> np.ndarray:
    size = whole.shape[-1]
    return 0.5 * (_transposed(whole) - whole)[..., *np.triu_indices(size, 1)]


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return matrices.swapaxes(-1, -2)


def _rounds(arrays: Arrays) -> dict[str, Any]:
    return {"block": _size_of_skew(arrays["skew"]), "rounds": len(arrays["skew"])}


BOFT = Form(
    "boft",
    "BOFT",
    {"skew": SlotForm("boft_R", _whole_skew, _entries_of_skew), "scale": column("boft_s")},
    _Boft,
    lambda options: {
        "boft_block_size": options["block"],
        "boft_block_num": 0,
        "boft_n_butterfly_factor": options["rounds"],
    },
    _boft_options,
    bias="boft_only",
    of_arrays=_rounds,
)


@dataclass(frozen=True)
class _C3a:
    block_size: Count = 256
    block_size_pattern: dict[str, Count] | None = None
    init_weights: bool | str | None = "xavier_uniform"


def _blocks_exchanged(kernel: np.ndarray) -> np.ndarray:
    return kernel.swapaxes(0, 1)


C3A = Form(
    "c3a",
    "C3A",
    {"kernel": SlotForm("c3a_kernel", _blocks_exchanged, _blocks_exchanged)},
    _C3a,
    bias="c3a_only",
    of_arrays=lambda arrays: {"block": arrays["kernel"].shape[-1]},
    patterned={"block": ("block_size", "block_size_pattern")},
)


@dataclass(frozen=True)
class _Fourierft:
    n_frequency: Count = 1000
    n_frequency_pattern: dict[str, Count] | None = None
    scaling: float = 150.0
    random_loc_seed: Seed = 777
    fan_in_fan_out: bool = False
    init_weights: bool = False


FOURIERFT = Form(
    "fourierft",
    "FOURIERFT",
    {"spectrum": same("fourierft_spectrum")},
    _Fourierft,
    lambda options: {"scaling": options["scale"], "random_loc_seed": options["seed"]},
    lambda fields: {"scale": fields.scaling, "seed": fields.random_loc_seed},
    bias="fourier_only",
    of_arrays=lambda arrays: {"count": len(arrays["spectrum"])},
    patterned={"count": ("n_frequency", "n_frequency_pattern")},
)


@dataclass(frozen=True)
class _Waveft:
    n_frequency: Count = 2592
    n_frequency_pattern: dict[str, Count] | None = None
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: Seed = 777
    proportional_parameters: bool = False
    fan_in_fan_out: bool = False
    init_weights: bool = True


def _waveft_options(fields: _Waveft) -> dict[str, Any]:
    if fields.use_idwt and fields.wavelet_family != "db1":
        raise PeftError(
            f"the file is of WaveFT with the wavelets {fields.wavelet_family!r}, and peftjax has Haar's, "
            "'db1'; train it with those, or merge it in PEFT"
        )
    return {
        "scale": fields.scaling,
        "seed": fields.random_loc_seed,
        "transform": fields.use_idwt,
    }


WAVEFT = Form(
    "waveft",
    "WAVEFT",
    {"spectrum": same("waveft_spectrum")},
    _Waveft,
    lambda options: {
        "scaling": options["scale"],
        "random_loc_seed": options["seed"],
        "use_idwt": options["transform"],
    },
    _waveft_options,
    bias="waveft_only",
    of_arrays=lambda arrays: {"count": len(arrays["spectrum"])},
    patterned={"count": ("n_frequency", "n_frequency_pattern")},
)


@dataclass(frozen=True)
class _Gralora:
    r: Count = 32
    alpha: float = 64.0
    hybrid_r: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    gralora_k: Count = 2
    gralora_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True


def _with_general(slots: SlotForms, fields: _Gralora) -> SlotForms:
    return slots if fields.hybrid_r else {slot: slots[slot] for slot in ("a", "b")}


GRALORA = Form(
    "gralora",
    "GRALORA",
    {
        "a": transposed("gralora_A"),
        "b": same("gralora_B"),
        "c": same("gralora_A_general.weight"),
        "d": transposed("gralora_B_general.weight"),
    },
    _Gralora,
    lambda options: {
        "alpha": options["alpha"],
        "hybrid_r": options["general"],
        "gralora_k": options["blocks"],
        "gralora_dropout": options["dropout"],
    },
    lambda fields: {
        "alpha": fields.alpha,
        "general": fields.hybrid_r,
        "blocks": fields.gralora_k,
        "dropout": fields.gralora_dropout,
    },
    rank=lambda arrays: arrays["a"].shape[-2],
    bias="gralora_only",
    with_fields=_with_general,
)


def _bone_options(fields: _Miss) -> dict[str, Any]:
    no_dropout(fields, "miss_dropout")
    return {}


BONE = Form(
    "bone",
    "MISS",
    {"block": transposed("miss_block")},
    _Miss,
    lambda options: {"init_weights": "bat"},
    _bone_options,
    rank=lambda arrays: arrays["block"].shape[-1],
    where={"init_weights": "bat"},
)


@dataclass(frozen=True)
class _Beft:
    init_weights: bool = True


BEFT = Form("beft", "BEFT", {"shift": row("beft_bias")}, _Beft)


@dataclass(frozen=True)
class _Deft:
    r: Count = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    deft_dropout: Rate = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True


DEFT = Form(
    "deft",
    "DEFT",
    {"p": transposed("deft_P"), "r": same("deft_R")},
    _Deft,
    lambda options: {
        "decomposition_method": options["directions"],
        "alpha": options["alpha"],
        "para": options["removed_only"],
        "deft_dropout": options["dropout"],
    },
    lambda fields: {
        "directions": fields.decomposition_method,
        "alpha": fields.alpha,
        "removed_only": fields.para,
        "dropout": fields.deft_dropout,
    },
    rank=rank_of("p"),
    bias="deft_only",
    with_fields=lambda slots, fields: {"p": slots["p"]} if fields.para else slots,
)


@dataclass(frozen=True)
class _Peanut:
    r: Count = 32
    depth: Annotated[int, Meta(ge=0, le=1000)] = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True


def _network(slots: SlotForms, fields: _Peanut) -> SlotForms:
    """The arrays of a network of so many layers."""
    found = dict(slots)
    for number in range(fields.depth):
        entering, leaving = layers_at(number)
        found[entering] = transposed(f"peanut_encoders.{number}.weight")
        found[leaving] = transposed(f"peanut_decoders.{number}.weight")
    return found


def _peanut_options(fields: _Peanut) -> dict[str, Any]:
    if fields.act_fn not in (known := get_args(Activation)):
        raise PeftError(
            f"the file is of PEANuT with act_fn {fields.act_fn!r}, and peftjax has {', '.join(known)}; "
            "merge it in PEFT, or train it with one of these"
        )
    return {"depth": fields.depth, "activation": fields.act_fn, "scale": fields.scaling}


PEANUT = Form(
    "peanut",
    "PEANUT",
    {"a": same("peanut_A.weight"), "b": transposed("peanut_B.weight")},
    _Peanut,
    lambda options: {
        "depth": options["depth"],
        "act_fn": options["activation"],
        "scaling": options["scale"],
    },
    _peanut_options,
    rank=rank_of("a"),
    with_fields=_network,
)


@dataclass(frozen=True)
class _Glora:
    r: Count = 8
    config_A_B: OfWeights = "lora"
    config_C: Coupling = "lora"
    config_D_E: OfBiases = "constant"
    init_weights: bool = True


def _held(slots: SlotForms, tensors: Arrays) -> list[str]:
    """What the file has of a module, which has fewer without a bias."""
    return [own for own, slot in slots.items() if slot.name in tensors]


def _glora_slots(slots: SlotForms, fields: _Glora) -> SlotForms:
    """Those of the fields' forms; PEFT calls numbers of all forms alike."""
    vector = column if fields.config_A_B == "vector" else same
    return {**slots, "scale": vector("glora_A.X"), "add": vector("glora_B.X")}


GLORA = Form(
    "glora",
    "GLORA",
    {
        "scale_a": same("glora_A.Xu"),
        "scale_b": transposed("glora_A.Xd"),
        "add_a": same("glora_B.Xu"),
        "add_b": transposed("glora_B.Xd"),
        "scale": same("glora_A.X"),
        "add": same("glora_B.X"),
        "inner_u": column("glora_C.Xu"),
        "inner_v": transposed("glora_C.Xd"),
        "inner": column("glora_C.X"),
        "gain": same("glora_D.X"),
        "shift": same("glora_E.X"),
    },
    _Glora,
    lambda options: {
        "config_A_B": options["weights"],
        "config_C": options["coupling"],
        "config_D_E": options["biases"],
    },
    lambda fields: {
        "weights": fields.config_A_B,
        "coupling": fields.config_C,
        "biases": fields.config_D_E,
    },
    rank=lambda arrays: next((len(arrays[slot]) for slot in ("scale_a", "inner_v") if slot in arrays), None),
    bias="glora_only",
    present=_held,
    with_fields=_glora_slots,
    unread=tuple(f"glora_{part}.zeros" for part in "ABCDE"),
)


STRUCTURED = (
    IA3,
    LOHA,
    HIRA,
    MISS,
    BONE,
    OFT,
    LOKR,
    HRA,
    ROAD,
    BOFT,
    C3A,
    FOURIERFT,
    WAVEFT,
    GRALORA,
    BEFT,
    DEFT,
    PEANUT,
    GLORA,
)
