"""The Llamas of GaLore's pre-training runs, from shapes alone, and what its paper says of their memory."""

from __future__ import annotations

import dataclasses

from experiments.memory.subjects import Subject
from peftjax.backbone.backbone import Backbone
from peftjax.models import llama
from peftjax.models.decoder import decoder

LENGTH = 256
VOCABULARY = 32_000


@dataclasses.dataclass(frozen=True)
class Size:
    """One of the Llamas.

    Attributes:
        name: as the paper calls it.
        width: of the model.
        inner: of the feed-forward.
        layers: blocks.
        heads: attention heads.
        rank: of projections and factors.
        paper: gigabytes of weights and optimizer state in the paper's table, of full training and GaLore.
    """

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    rank: int
    paper: tuple[float, float] | None = None

    @property
    def subject(self) -> Subject:
        """The model in bfloat16 on one row of 256 tokens."""
        return Subject(self.name, self._build, 1, LENGTH, "bfloat16")

    def _build(self, layers: int | None, dtype: str) -> Backbone:
        values = {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": LENGTH,
            "tie_word_embeddings": False,
        }
        return decoder(llama.read_config(values), head="causal_lm", dtype=dtype)


SIZES = (
    Size("60M", 512, 1376, 8, 8, 128, (0.36, 0.24)),
    Size("130M", 768, 2048, 12, 12, 256, (0.76, 0.52)),
    Size("350M", 1024, 2736, 24, 16, 256, (2.06, 1.22)),
    Size("1B", 2048, 5461, 24, 32, 512, (7.80, 4.38)),
    Size("7B", 4096, 11008, 32, 32, 1024),
)
