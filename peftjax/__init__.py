"""peftjax: parameter- and memory-efficient fine-tuning for JAX, as rewrites of a training step."""

from peftjax import adapters, calibrate, losses, methods, optim, parallel, prune
from peftjax.core.errors import PeftError
from peftjax.generation.generate import generate
from peftjax.hf.export import export_peft
from peftjax.hf.load import import_peft
from peftjax.interpreter import adapt, layouts_of
from peftjax.methods import *  # noqa: F403
from peftjax.methods.bottleneck.mam import without_mlp
from peftjax.methods.prompt.prefix import prefix_of
from peftjax.methods.residuals.repavit import repavit_merged
from peftjax.methods.reversible.check import meft_check
from peftjax.methods.sparse.snell import set_sparsity
from peftjax.methods.structured.batch_ensemble import member_of
from peftjax.models.load import load
from peftjax.models.save import save
from peftjax.planner.step import plan
from peftjax.train.step import training
from peftjax.transform.chain import chain
from peftjax.transform.frozen import Frozen
from peftjax.transform.registry import METHODS, Conformance, MethodInfo, build, describe, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight, dense, matmul

__all__ = [
    "METHODS",
    "Conformance",
    "Frozen",
    "MethodInfo",
    "PeftError",
    "Transform",
    "Weight",
    "adapt",
    "adapters",
    "build",
    "calibrate",
    "chain",
    "dense",
    "describe",
    "export_peft",
    "generate",
    "import_peft",
    "layouts_of",
    "load",
    "losses",
    "matmul",
    "meft_check",
    "member_of",
    "optim",
    "parallel",
    "plan",
    "prefix_of",
    "prune",
    "register",
    "repavit_merged",
    "save",
    "set_sparsity",
    "training",
    "without_mlp",
]
__all__ += methods.__all__
