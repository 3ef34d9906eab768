"""One mesh for everything: parameters, what a method adds, the optimizer's state, batches and activations."""

from peftjax.core.mesh_axes import AXES
from peftjax.parallel.mesh import make_mesh, read_mesh
from peftjax.parallel.placement import shard, shard_batch, shard_state
from peftjax.parallel.rules import BLOCKS, Rules, shardings

__all__ = [
    "AXES",
    "BLOCKS",
    "Rules",
    "make_mesh",
    "read_mesh",
    "shard",
    "shard_batch",
    "shard_state",
    "shardings",
]
