"""The memory of sparse tuning of vision transformers, asked of the H200's compiler; nothing is run.

    pip install -e ".[experiments]"
    pip install --no-deps jax-cuda13-pjrt==JAX jax-cuda13-plugin==JAX    # JAX: the version of jax
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
    JAX_PLATFORMS=cpu python -m experiments.sparse.memory

One training step (`pj.plan`) of ViT-B/16, L/16 and H/14: batch 8, 224 x 224, float32, AdamW, 1000 classes, no
dropout. Everything but full fine-tuning also trains the head and the class token, as the papers do. Their
numbers are of PyTorch on a GPU, whose attention keeps its weights; here no attention weights are kept, so the
comparison is of ratios, not of bytes. Results of an earlier run stay where this one does not replace them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import peftjax as pj
from experiments.sparse.masked import masked
from experiments.sparse.memory_report import NAIVE, plot, report
from experiments.sparse.naive import naive
from peftjax.models.vit import ViTConfig, vit

MODELS = {
    "ViT-B/16": ViTConfig(768, 12, 12, 3072),
    "ViT-L/16": ViTConfig(1024, 24, 16, 4096),
    "ViT-H/14": ViTConfig(1280, 32, 16, 5120, patch_size=(14, 14)),
}
ROWS: dict[str, Callable[[], pj.Transform]] = {
    "full": pj.full,
    "LoRA-8": partial(pj.lora, rank=8),
    "SNELL-8": partial(pj.snell, rank=8),
    "SNELL-32": partial(pj.snell, rank=32),
    "SNELLA-32": partial(pj.snella, rank=32, total_steps=10_000),
    "masked": masked,
    "PaCA-16": partial(pj.paca, rank=16),
    "PaCA-16 in place": partial(pj.paca, rank=16, in_place=True),
    "SHiRA-8": partial(pj.shira, rank=8),
    "SHiRA-8 in place": partial(pj.shira, rank=8, in_place=True),
    NAIVE: lambda: naive(pj.snell(rank=8)),
}
"""Methods by their name in the tables; the last is measured on the first model only."""
TRAINED_TOO = ["classifier", "class_token"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to ask the compiler, and where to write."""

    output: Path = Path("experiments/sparse/results")
    """Where memory.json, memory.md and memory.png go."""
    target: str = "h200"
    """The machine."""
    models: tuple[str, ...] = tuple(MODELS)
    """Which models."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Which methods."""
    batch: int = 8
    """Images a step."""
    classes: int = 1000
    """Width of the head."""


def method_of(row: str) -> pj.Transform:
    """The method of a row, with the head and the class token."""
    method = ROWS[row]()
    return method if row == "full" else pj.chain(method, pj.unfreeze(TRAINED_TOO))


def measure(config: ViTConfig, row: str, options: Options) -> pj.Plan:
    """What one step of a row needs."""
    model = vit(config.with_num_labels(options.classes), head="classifier")
    image = (options.batch, config.num_channels, *config.image_size)
    batch = {
        "pixel_values": jax.ShapeDtypeStruct(image, jnp.float32),
        "labels": jax.ShapeDtypeStruct((options.batch,), jnp.int32),
    }
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    # Without decay, which would move the entries that `masked` does not train.
    optimizer = optax.adamw(1e-3, weight_decay=0.0)
    return pj.plan(method_of(row), model, params, batch, optimizer=optimizer, target=options.target)


def main(options: Options) -> None:
    """Measure, and write what was measured after every row."""
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "memory.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in options.models:
        for row in options.rows:
            if row == NAIVE and name != next(iter(MODELS)):
                continue
            plan = measure(MODELS[name], row, options)
            print(f"{name}, {row}: {plan}", flush=True)
            results.setdefault(name, {})[row] = record(plan, options)
            file.write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "memory.md").write_text(report(results))
    plot(results, options.output / "memory.png")
    print(report(results))


def record(plan: pj.Plan, options: Options) -> dict[str, Any]:
    """A plan as JSON values, with the peak and what it was made with."""
    made_with = {"batch": options.batch, "classes": options.classes, "jax": jax.__version__}
    return {**dataclasses.asdict(plan), "peak": plan.bytes.peak, **made_with}


if __name__ == "__main__":
    main(tyro.cli(Options))
