"""PEFT's files of ADAMSS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import numpy as np
from msgspec import Meta

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Rate, Seed, Steps
from peftjax.hf.forms.form import Arrays, Base, Form, SlotForm, same
from peftjax.methods.lowrank._clusters import clustered, first_directions


@dataclass(frozen=True)
class _Adamss:
    r: Count = 100
    num_subspaces: Count = 5
    subspace_rank: Count = 1
    init_weights: str | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: Count = 50
    init_warmup: Steps = 50
    final_warmup: Steps = 1000
    mask_interval: Count = 100
    asa_importance_beta: Rate = 0.85
    asa_uncertainty_beta: Rate = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    random_seed: Seed = 0


def _adamss_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        "r": options["rank"],
        "num_subspaces": options["subspaces"],
        "subspace_rank": options["subspace_rank"],
        "use_asa": options["target_subspaces"] is not None,
        "init_warmup": options["init_warmup"],
        "final_warmup": options["final_warmup"],
        "mask_interval": options["allocate_every"],
        "asa_importance_beta": options["beta1"],
        "asa_uncertainty_beta": options["beta2"],
        "asa_schedule_exponent": options["exponent"],
        "use_dynamic_rank": options["threshold"] is not None,
        "random_seed": options["seed"],
    }
    if options["target_subspaces"] is not None:
        fields["asa_target_subspaces"] = options["target_subspaces"]
    if options["threshold"] is not None:
        fields["svd_threshold"] = options["threshold"]
    return fields


def _adamss_options(fields: _Adamss) -> dict[str, Any]:
    return {
        "rank": fields.r,
        "subspaces": fields.num_subspaces,
        "subspace_rank": fields.subspace_rank,
        "target_subspaces": fields.asa_target_subspaces if fields.use_asa else None,
        "init_warmup": fields.init_warmup,
        "final_warmup": fields.final_warmup,
        "allocate_every": fields.mask_interval,
        "beta1": fields.asa_importance_beta,
        "beta2": fields.asa_uncertainty_beta,
        "exponent": fields.asa_schedule_exponent,
        "threshold": fields.svd_threshold if fields.use_dynamic_rank else None,
        "seed": fields.random_seed,
    }


def _by_cluster(arrays: Arrays, shared: Arrays, options: Mapping[str, Any]) -> Arrays:
    """The arrays of each cluster, of its own rows and rank."""
    a, b = [], []
    for number, own in enumerate(arrays["a"]):
        rank = max(1, int(own.any(axis=-1).sum()))
        a.append(own[:rank])
        b.append(arrays["b"][arrays["cluster"] == number][:, :rank])
    v = arrays["v"]
    if "of_bias" in arrays:
        v = np.concatenate([v, arrays["of_bias"][:, None]], axis=-1)
    return {"a": a, "b": b, "v": v}


def _by_output(arrays: Arrays, shared: Arrays, base: Base, fields: _Adamss) -> Arrays:
    """One array of the clusters, and one of the outputs, each row with its cluster, which the base tells."""
    whole = base.weight if base.bias is None else np.concatenate([base.weight, base.bias[None]])
    n, m = base.weight.shape
    if len(arrays["v"]) == m:
        raise PeftError(
            f"with {m} directions of {m} outputs all rows of the basis are equally far from each other, and "
            "rounding decides on the clusters, which the file does not say; merge the adapter in PEFT"
        )
    cluster = np.asarray(_clusters(whole, len(arrays["a"]), fields.r, fields.random_seed))
    sizes = np.bincount(cluster, minlength=len(arrays["a"])).tolist()
    if sizes != [len(own) for own in arrays["b"]] or len(arrays["v"].T) != len(whole):
        raise PeftError(
            f"the outputs of a module fall into clusters of {sizes} rows, and the file has arrays of "
            f"{[len(own) for own in arrays['b']]}: its base is another one, or its clusters were found on "
            "another kind of machine; merge the adapter in PEFT"
        )
    r = min(fields.subspace_rank, len(arrays["v"]))
    a = np.zeros((len(sizes), r, len(arrays["v"])), np.float32)
    b = np.zeros((m, r), np.float32)
    for number, (own_a, own_b) in enumerate(zip(arrays["a"], arrays["b"])):
        a[number, : len(own_a)] = own_a
        b[cluster == number, : own_b.shape[1]] = own_b
    found = {"a": a, "b": b, "v": arrays["v"][:, :n], "cluster": cluster}
    return found if base.bias is None else {**found, "of_bias": arrays["v"][:, n]}


@partial(jax.jit, static_argnums=(1, 2, 3))
def _clusters(w: np.ndarray, count: int, rank: int, seed: int) -> jax.Array:
    return clustered(first_directions(w.T, rank, seed).left, count)


ADAMSS = Form(
    "adamss",
    "ADAMSS",
    {
        "a": SlotForm("adamss_A.{row}", list, list),
        "b": SlotForm("adamss_B.{row}", list, list),
        "v": same("adamss_newB"),
    },
    _Adamss,
    _adamss_fields,
    _adamss_options,
    packed=_by_cluster,
    of_base=_by_output,
)
