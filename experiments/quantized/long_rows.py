"""One row of many tokens: what a QLoRA step of Llama-3-8B needs on an H200, fixed and for each token.

    python -m experiments.quantized.long_rows

Asked of the H200's compiler; nothing is run. Fixed and per token are the line through two lengths. The
record known to us for QLoRA at this size is 7.37 GiB and 227.5 kB a token (`RECORD`). Measured: with
"offload_attention" and tiles of 2,048 tokens the peak is below the record's on rows of 32,768 and 65,536
tokens, and above it on 131,072.
"""

import argparse
import dataclasses
import json

import optax

import peftjax as pj
from experiments.step_memory.models import LLAMA_3_8B, llama_model
from peftjax.planner.step import Bytes

RECORD = (7.37 * 2**30, 227.5e3)
"""Bytes that are fixed, and for each token."""
LENGTHS = (32_768, 65_536, 131_072)
POLICIES = {
    "remat": ("nothing_saveable", None),
    "remat, tiles": ("nothing_saveable", 2048),
    "offloaded, tiles": ("offload_attention", 2048),
}


def planned(policy: str, tokens: int, target: str) -> Bytes:
    """What a step on one row takes."""
    remat, tile = POLICIES[policy]
    model = llama_model("Llama-3-8B", LLAMA_3_8B, 1, tokens)
    backbone = dataclasses.replace(model.backbone(remat), feed_forward_tile=tile)
    return pj.plan(
        pj.chain(pj.nf4(), pj.lora(rank=16)),
        backbone,
        model.params(backbone),
        model.inputs(backbone),
        optimizer=optax.adamw(1e-4),
        target=target,
    ).bytes


def main() -> None:
    """Print a line for each policy and length, and the fixed and growing parts of each policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", default="h200", help="as of pj.plan")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    arguments = parser.parse_args()
    for policy in arguments.policies:
        peaks = []
        for tokens in LENGTHS:
            found = planned(policy, tokens, arguments.target)
            peaks.append(found.peak)
            sizes = {"peak": found.peak, "host": found.host, "record": RECORD[0] + RECORD[1] * tokens}
            sizes = {name: round(size / 2**30, 2) for name, size in sizes.items()}
            print(policy, f"{tokens:,} tokens, GiB:", json.dumps(sizes), flush=True)
        each = (peaks[-1] - peaks[0]) / (LENGTHS[-1] - LENGTHS[0])
        fixed = (peaks[0] - each * LENGTHS[0]) / 2**30
        print(policy, f"{fixed:.2f} GiB fixed, {each / 1e3:.1f} kB a token", flush=True)


if __name__ == "__main__":
    main()
