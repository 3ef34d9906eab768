"""peftjax: parameter- and memory-efficient fine-tuning for JAX, as rewrites of a training step."""

import peftjax.train  # noqa: F401  (loaded first, so that the name stays the function's below)
from peftjax import losses
from peftjax.adapt import adapt, layouts_of
from peftjax.errors import PeftError
from peftjax.generation.generate import Generated, generate
from peftjax.io.peft.export import export_peft
from peftjax.io.peft.load import import_peft
from peftjax.methods import METHODS, build, describe
from peftjax.methods.blocks.adapters import pfeiffer
from peftjax.methods.blocks.sherl import sherl
from peftjax.methods.blocks.unipt import unipt
from peftjax.methods.blocks.vqt import vqt
from peftjax.methods.lowrank.dora import dora
from peftjax.methods.lowrank.lora import lora
from peftjax.methods.lowrank.lora_fa import lora_fa
from peftjax.methods.lowrank.lora_plus import lora_plus
from peftjax.methods.lowrank.olora import olora
from peftjax.methods.lowrank.pissa import pissa
from peftjax.methods.lowrank.rslora import rslora
from peftjax.methods.multi.adapters import add, combine, mix
from peftjax.methods.multi.convert import to_lora
from peftjax.methods.multi.sparse import fuse, overlap, patches, switch
from peftjax.methods.select.plain import bitfit, freeze, full, train
from peftjax.methods.select.rows import rows
from peftjax.methods.sparse.mean_gradient import mean_gradient
from peftjax.methods.sparse.paca import paca
from peftjax.methods.sparse.sara import sara
from peftjax.methods.sparse.shira import shira
from peftjax.methods.sparse.snell import set_sparsity, snell
from peftjax.methods.sparse.snella import snella
from peftjax.models.load import load, save
from peftjax.plan import Plan, plan
from peftjax.transform import Frozen, MethodInfo, Transform, chain
from peftjax.weights.base import Weight, dense, matmul

__all__ = [
    "METHODS",
    "Frozen",
    "Generated",
    "MethodInfo",
    "PeftError",
    "Plan",
    "Transform",
    "Weight",
    "adapt",
    "add",
    "bitfit",
    "build",
    "chain",
    "combine",
    "dense",
    "describe",
    "dora",
    "export_peft",
    "freeze",
    "full",
    "fuse",
    "generate",
    "import_peft",
    "layouts_of",
    "load",
    "lora",
    "lora_fa",
    "lora_plus",
    "losses",
    "matmul",
    "mean_gradient",
    "mix",
    "olora",
    "overlap",
    "paca",
    "patches",
    "pfeiffer",
    "pissa",
    "plan",
    "rows",
    "rslora",
    "sara",
    "save",
    "set_sparsity",
    "sherl",
    "shira",
    "snell",
    "snella",
    "switch",
    "to_lora",
    "train",
    "unipt",
    "vqt",
]
