"""What a step of AdamW on all weights takes with the optimizer's state in the host's memory.

    python -m experiments.step_memory.paged_optimizer
    python -m experiments.step_memory.paged_optimizer --model large --targets v5e:2x2

Asked of the compilers for an H200 and a TPU v5e; nothing is run. Expected, in MiB: small (119 million
parameters) on an H200 1,842 and, paged, 1,209; on a v5e 1,901 and 1,870. Large (1.06 billion) does not fit
into a v5e's 15.75 GiB, and paged takes 14,848 MiB of it.
"""

import argparse
from typing import get_args

import jax
import jax.numpy as jnp
import optax

import peftjax as pj
from experiments.step_memory.models import llama_model
from peftjax.core.errors import PeftError
from peftjax.train.paging import OptimizerMemory

LLAMA = {"model_type": "llama", "vocab_size": 8000, "tie_word_embeddings": False}
SIZES = {
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "large": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
    },
}


def planned(size: str, target: str, memory: OptimizerMemory) -> str:
    """A line of what the step takes, or of why it does not fit; weights and state are float32."""
    model = llama_model(size, {**LLAMA, **SIZES[size]}, 1, 512)
    backbone = model.backbone("nothing_saveable")
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), model.params(backbone))
    batch, tx = model.inputs(backbone), optax.adamw(1e-4)
    try:
        found = pj.plan(
            pj.full(), backbone, params, batch, optimizer=tx, target=target, optimizer_memory=memory
        )
    except PeftError as error:
        return str(error)
    return f"peak {found.bytes.peak / 2**20:,.0f} MiB, on the host {found.bytes.host / 2**20:,.0f} MiB"


def main() -> None:
    """Print a line for each target and place of the state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--targets", nargs="+", default=["h200", "v5e:2x2"], help="as of pj.plan")
    arguments = parser.parse_args()
    for target in arguments.targets:
        for memory in get_args(OptimizerMemory):
            print(
                arguments.model,
                target,
                memory,
                planned(arguments.model, target, memory),
                sep=": ",
                flush=True,
            )


if __name__ == "__main__":
    main()
