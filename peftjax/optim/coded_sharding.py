"""The sharding of an optimizer's state with codes: that of the parameters that it mirrors."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.quantize.blockwise import BlockwiseCodes
from peftjax.transform.moment_fields import parameter_of


def shardings_like(state: Any, params: Any) -> Any:
    """The sharding of each leaf of a state (of shapes); None where no parameter has one.

    Codes shard as the parameter does, their scales as its leading axes and, where it cuts through no block,
    its last one. What mirrors no parameter, or not its shape, is replicated.
    """
    known = {tuple(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    meshes = [leaf.sharding for leaf in known.values() if _is_named(leaf)]
    if not meshes:
        return None
    whole = NamedSharding(meshes[0].mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        param = _mirrored(path, leaf, known)
        sharding = whole if param is None else param.sharding
        if not isinstance(leaf, BlockwiseCodes):
            return sharding
        return BlockwiseCodes(sharding, _of_scales(leaf, sharding), leaf.signed, leaf.block, leaf.merged)

    return jax.tree_util.tree_map_with_path(
        place, state, is_leaf=lambda node: isinstance(node, BlockwiseCodes)
    )


def _is_named(leaf: Any) -> bool:
    return not isinstance(leaf, jax.core.Tracer) and isinstance(
        getattr(leaf, "sharding", None), NamedSharding
    )


def _mirrored(path: tuple[Any, ...], leaf: Any, known: Mapping[tuple[Any, ...], Any]) -> Any:
    param = known.get(parameter_of(path, known))
    shape = leaf.codes.shape if isinstance(leaf, BlockwiseCodes) else leaf.shape
    return param if param is not None and _is_named(param) and param.shape == shape else None


def _of_scales(coded: BlockwiseCodes, sharding: NamedSharding) -> NamedSharding:
    shape = coded.codes.shape
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    last = spec[-1] if coded.merged == 1 else None
    scales = NamedSharding(sharding.mesh, PartitionSpec(*spec[: len(shape) - coded.merged], last))
    blocks = coded.scales.shape[-1]
    if blocks % (shape[-1] // sharding.shard_shape(shape)[-1]) == 0:
        return scales
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[: len(shape) - coded.merged], None))
