"""Peak host memory of loading a checkpoint into codes: a random Llama-like one of 1 GB in bfloat16.

    python -m experiments.quantized.load_memory

Each run is a process of its own. `peak` is the largest resident memory while loading, beyond what the process
has after it loaded a small checkpoint. It should stay below `bound`: codes, other parameters and the largest
tensor. Measured, in MB: nf4 holds 474, peak 547, bound 605; floats hold 1,084, peak 1,152, bound 1,215.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np

import peftjax as pj
from peftjax.models.families import FAMILIES
from peftjax.models.save import save

SIZES = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "tie_word_embeddings": False,
}
TINY = {"num_hidden_layers": 2, "vocab_size": 8}
METHODS = {
    "none": lambda: None,
    "nf4": pj.nf4,
    "int8": lambda: pj.quantized(format="int8"),
    "mxfp4": lambda: pj.quantized(format="mxfp4"),
}


def write(folder: Path, **sizes: int) -> None:
    """A checkpoint of random numbers in bfloat16."""
    family = FAMILIES[SIZES["model_type"]]
    model = family.build(family.read_config({**SIZES, **sizes}), head="causal_lm")
    rng = np.random.default_rng(0)
    specs = jax.eval_shape(model.init, jax.random.key(0))
    dtype = jax.numpy.bfloat16
    save(folder, model, jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(dtype), specs))


def kilobytes(name: str) -> int:
    """A line of what Linux says of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measured(folder: Path, name: str) -> dict[str, float]:
    """Megabytes that the parameters hold, that the largest is, and that loading took at most."""
    method = METHODS[name]()
    load = partial(pj.load, head="causal_lm", param_dtype="bfloat16", quantize=method)
    load(folder / "tiny")  # the libraries
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    _, params = load(folder / "large")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    peak = 1024 * (kilobytes("VmHWM") - before)
    return {"held": held / 1e6, "largest": largest / 1e6, "peak": peak / 1e6, "bound": (held + largest) / 1e6}


def main() -> None:
    """Write the checkpoints, and measure each method in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "METHOD"), help="measure one, in this process")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to measure"
    )
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(Path(arguments.one[0]), arguments.one[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "tiny", **TINY)
        write(Path(folder) / "large")
        # Without it glibc keeps freed arrays of up to 32 MB for itself, and they count as resident.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        for name in arguments.methods:
            command = [sys.executable, "-m", "experiments.quantized.load_memory", "--one", folder, name]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            print(name, json.loads(run.stdout))


if __name__ == "__main__":
    main()
