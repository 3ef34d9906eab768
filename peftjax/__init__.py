"""peftjax: parameter- and memory-efficient fine-tuning for JAX, as rewrites of a training step."""

from peftjax import adapters, calibrate, losses, optim
from peftjax.core.errors import PeftError
from peftjax.generation.generate import generate
from peftjax.hf.export import export_peft
from peftjax.hf.load import import_peft
from peftjax.interpreter import adapt, layouts_of
from peftjax.methods.bottleneck.adapters import adaptformer, houlsby, parallel_adapter, pfeiffer
from peftjax.methods.bottleneck.mam import mam, without_mlp
from peftjax.methods.lowrank.dora import dora
from peftjax.methods.lowrank.lora import lora
from peftjax.methods.lowrank.lora_fa import lora_fa
from peftjax.methods.lowrank.lora_plus import lora_plus
from peftjax.methods.lowrank.lowrank_restarts import lowrank_restarts
from peftjax.methods.lowrank.olora import olora
from peftjax.methods.lowrank.pissa import pissa
from peftjax.methods.lowrank.rslora import rslora
from peftjax.methods.lowrank.switchlora import switchlora
from peftjax.methods.projected.galore import galore
from peftjax.methods.projected.natural_galore import natural_galore
from peftjax.methods.prompt.prefix import prefix, prefix_of
from peftjax.methods.residuals.coded_residuals import coded_residuals
from peftjax.methods.residuals.s2a import s2a
from peftjax.methods.reversible.check import meft_check
from peftjax.methods.reversible.meft import meft
from peftjax.methods.selection.plain import bitfit, freeze, full, unfreeze
from peftjax.methods.selection.rows import rows
from peftjax.methods.side.lst import lst
from peftjax.methods.side.sherl import sherl
from peftjax.methods.side.unipt import unipt
from peftjax.methods.side.vqt import vqt
from peftjax.methods.sparse.paca import paca
from peftjax.methods.sparse.sara import sara
from peftjax.methods.sparse.shira import shira
from peftjax.methods.sparse.snell import set_sparsity, snell
from peftjax.methods.sparse.snella import snella
from peftjax.models.load import load, save
from peftjax.planner.step import plan
from peftjax.train.step import training
from peftjax.transform.chain import chain
from peftjax.transform.frozen import Frozen
from peftjax.transform.registry import METHODS, build, describe
from peftjax.transform.transform import MethodInfo, Transform
from peftjax.weights.base import Weight, dense, matmul

__all__ = [
    "METHODS",
    "Frozen",
    "MethodInfo",
    "PeftError",
    "Transform",
    "Weight",
    "adapt",
    "adapters",
    "adaptformer",
    "bitfit",
    "build",
    "calibrate",
    "chain",
    "coded_residuals",
    "dense",
    "describe",
    "dora",
    "export_peft",
    "freeze",
    "full",
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
    "meft",
    "meft_check",
    "natural_galore",
    "olora",
    "optim",
    "paca",
    "parallel_adapter",
    "pfeiffer",
    "pissa",
    "plan",
    "prefix",
    "prefix_of",
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
    "switchlora",
    "training",
    "unfreeze",
    "unipt",
    "vqt",
    "without_mlp",
]
