"""Models made smaller: what goes together, what matters, and what is left, masked or in smaller arrays."""

from peftjax.prune.budget import largest_share, parameters
from peftjax.prune.experts import router_scores
from peftjax.prune.find import groups_of
from peftjax.prune.group import Group, Member
from peftjax.prune.layers import layer_scores, reset_layers, skippable, with_layers
from peftjax.prune.masking import Masked, gated, masked, with_entries
from peftjax.prune.obs import Reconstructed, sparsegpt
from peftjax.prune.scores import beta_rank, lora_gradients, magnitude, pooled, taylor, wanda
from peftjax.prune.selection import select, select_entries, select_n_of_m
from peftjax.prune.slicing import Recipe, Sliced, recover, sliced

__all__ = [
    "Group",
    "Masked",
    "Member",
    "Recipe",
    "Reconstructed",
    "Sliced",
    "beta_rank",
    "gated",
    "groups_of",
    "largest_share",
    "layer_scores",
    "lora_gradients",
    "magnitude",
    "masked",
    "parameters",
    "pooled",
    "recover",
    "reset_layers",
    "router_scores",
    "select",
    "select_entries",
    "select_n_of_m",
    "skippable",
    "sliced",
    "sparsegpt",
    "taylor",
    "wanda",
    "with_entries",
    "with_layers",
]
