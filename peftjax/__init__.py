"""peftjax: parameter- and memory-efficient fine-tuning for JAX, as rewrites of a training step."""

import peftjax.train  # noqa: F401  (loaded first, so that the name stays the function's below)
from peftjax import losses, optim
from peftjax.adapt import adapt, layouts_of
from peftjax.chain import chain
from peftjax.errors import PeftError
from peftjax.generation.generate import Generated, generate
from peftjax.io.peft.export import export_peft
from peftjax.io.peft.load import import_peft
from peftjax.methods import METHODS, build, describe
from peftjax.methods.blocks.adapters import adaptformer, houlsby, parallel_adapter, pfeiffer
from peftjax.methods.blocks.coded_residuals import coded_residuals
from peftjax.methods.blocks.fisher import fisher_information
from peftjax.methods.blocks.lst import lst
from peftjax.methods.blocks.mam import mam, without_mlp
from peftjax.methods.blocks.meft import meft
from peftjax.methods.blocks.meft_check import MeftReport, meft_check
from peftjax.methods.blocks.prefix import prefix, prefix_of
from peftjax.methods.blocks.s2a import s2a
from peftjax.methods.blocks.sherl import sherl
from peftjax.methods.blocks.unipt import unipt
from peftjax.methods.blocks.vqt import vqt
from peftjax.methods.lowrank.dora import dora
from peftjax.methods.lowrank.lora import lora
from peftjax.methods.lowrank.lora_fa import lora_fa
from peftjax.methods.lowrank.lora_plus import lora_plus
from peftjax.methods.lowrank.lowrank_restarts import lowrank_restarts
from peftjax.methods.lowrank.olora import olora
from peftjax.methods.lowrank.pissa import pissa
from peftjax.methods.lowrank.rebalance import rebalance
from peftjax.methods.lowrank.rslora import rslora
from peftjax.methods.lowrank.switchlora import switchlora
from peftjax.methods.multi.adapters import add, combine, mix
from peftjax.methods.multi.convert import to_lora
from peftjax.methods.multi.sparse import fuse, overlap, patches, switch
from peftjax.methods.projected.galore import galore
from peftjax.methods.projected.natural_galore import natural_galore
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
from peftjax.transform import Frozen, MethodInfo, Renewal, Transform
from peftjax.weights.base import Weight, dense, matmul

__all__ = [
    "METHODS",
    "Frozen",
    "Generated",
    "MeftReport",
    "MethodInfo",
    "PeftError",
    "Plan",
    "Renewal",
    "Transform",
    "Weight",
    "adapt",
    "adaptformer",
    "add",
    "bitfit",
    "build",
    "chain",
    "coded_residuals",
    "combine",
    "dense",
    "describe",
    "dora",
    "export_peft",
    "fisher_information",
    "freeze",
    "full",
    "fuse",
    "galore",
    "generate",
    "houlsby",
    "import_peft",
    "layouts_of",
    "load",
    "lora",
    "lora_fa",
    "lora_plus",
    "losses",
    "lowrank_restarts",
    "lst",
    "mam",
    "matmul",
    "mean_gradient",
    "meft",
    "meft_check",
    "mix",
    "natural_galore",
    "olora",
    "optim",
    "overlap",
    "paca",
    "parallel_adapter",
    "patches",
    "pfeiffer",
    "pissa",
    "plan",
    "prefix",
    "prefix_of",
    "rebalance",
    "rows",
    "rslora",
    "s2a",
    "sara",
    "save",
    "set_sparsity",
    "sherl",
    "shira",
    "snell",
    "snella",
    "switch",
    "switchlora",
    "to_lora",
    "train",
    "unipt",
    "vqt",
    "without_mlp",
]
