"""What is done with trained adapters: arithmetic, mixing by row, conversion, exchange, files."""

from peftjax.adapters.arithmetic import add, alike, combine, mix
from peftjax.adapters.conversion import to_lora
from peftjax.adapters.files import Adapter, load_adapter, save_adapter
from peftjax.adapters.rounding import rounded
from peftjax.adapters.routing import arrow
from peftjax.adapters.sparse import fuse, overlap, patches, switch
from peftjax.core.linalg import rebalance
from peftjax.methods.lowrank._ranks import ranks

__all__ = [
    "Adapter",
    "add",
    "alike",
    "arrow",
    "combine",
    "fuse",
    "load_adapter",
    "mix",
    "overlap",
    "patches",
    "ranks",
    "rebalance",
    "rounded",
    "save_adapter",
    "switch",
    "to_lora",
]
