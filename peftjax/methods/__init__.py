"""One published method per file, grouped by mechanism; a new one is one line here."""

# In the order in which lists of the methods show them.
# isort: off
from peftjax.methods.lowrank.lora import lora as lora
from peftjax.methods.lowrank.rslora import rslora as rslora
from peftjax.methods.lowrank.lora_plus import lora_plus as lora_plus
from peftjax.methods.lowrank.lora_fa import lora_fa as lora_fa
from peftjax.methods.lowrank.riemannian_lora import riemannian_lora as riemannian_lora
from peftjax.methods.lowrank.dora import dora as dora
from peftjax.methods.lowrank.pissa import pissa as pissa
from peftjax.methods.lowrank.olora import olora as olora
from peftjax.methods.lowrank.lora_ga import lora_ga as lora_ga
from peftjax.methods.lowrank.eva import eva as eva
from peftjax.methods.lowrank.corda import corda as corda
from peftjax.methods.lowrank.lowrank_restarts import lowrank_restarts as lowrank_restarts
from peftjax.methods.lowrank.switchlora import switchlora as switchlora
from peftjax.methods.lowrank.vera import vera as vera
from peftjax.methods.lowrank.roast import roast as roast
from peftjax.methods.structured.ia3 import ia3 as ia3
from peftjax.methods.structured.loha import loha as loha
from peftjax.methods.structured.hira import hira as hira
from peftjax.methods.structured.miss import miss as miss
from peftjax.methods.structured.oft import oft as oft
from peftjax.methods.structured.phm import phm as phm
from peftjax.methods.structured.phm_layers import phm_layers as phm_layers
from peftjax.methods.structured.structured_ffn import structured_ffn as structured_ffn
from peftjax.methods.structured.batch_ensemble import batch_ensemble as batch_ensemble
from peftjax.methods.structured.weight_compander import weight_compander as weight_compander
from peftjax.methods.structured.sigma_reparam import sigma_reparam as sigma_reparam
from peftjax.methods.sparse.snell import snell as snell
from peftjax.methods.sparse.snella import snella as snella
from peftjax.methods.sparse.paca import paca as paca
from peftjax.methods.sparse.shira import shira as shira
from peftjax.methods.sparse.sara import sara as sara
from peftjax.methods.projected.galore import galore as galore
from peftjax.methods.projected.natural_galore import natural_galore as natural_galore
from peftjax.methods.selection.rows import rows as rows
from peftjax.methods.selection.plain import full as full
from peftjax.methods.selection.plain import bitfit as bitfit
from peftjax.methods.selection.plain import unfreeze as unfreeze
from peftjax.methods.selection.plain import freeze as freeze
from peftjax.methods.bottleneck.adapters import houlsby as houlsby
from peftjax.methods.bottleneck.adapters import pfeiffer as pfeiffer
from peftjax.methods.bottleneck.adapters import parallel_adapter as parallel_adapter
from peftjax.methods.bottleneck.adapters import adaptformer as adaptformer
from peftjax.methods.prompt.prefix import prefix as prefix
from peftjax.methods.bottleneck.mam import mam as mam
from peftjax.methods.residuals.coded_residuals import coded_residuals as coded_residuals
from peftjax.methods.residuals.s2a import s2a as s2a
from peftjax.methods.side.lst import lst as lst
from peftjax.methods.reversible.meft import meft as meft
from peftjax.methods.side.vqt import vqt as vqt
from peftjax.methods.side.lama import lama as lama
from peftjax.methods.side.unipt import unipt as unipt
from peftjax.methods.side.sherl import sherl as sherl
from peftjax.methods.quantization.nf4 import nf4 as nf4
from peftjax.methods.quantization.quantized import quantized as quantized
from peftjax.methods.quantization.peqa import peqa as peqa
from peftjax.methods.quantization.qpaca import qpaca as qpaca
from peftjax.methods.quantization.flexround import flexround as flexround
from peftjax.methods.quantization.rounded_activations import rounded_activations as rounded_activations
from peftjax.methods.quantization.loftq import loftq as loftq
from peftjax.methods.quantization.qa_lora import qa_lora as qa_lora
from peftjax.methods.quantization.bitstack import bitstack as bitstack
from peftjax.methods.quantization.quantized_adapter import quantized_adapter as quantized_adapter

__all__ = [name for name, value in globals().items() if callable(value) and not name.startswith("_")]
