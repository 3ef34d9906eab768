"""The race's training step in Hugging Face's PEFT on PyTorch, with their defaults (SDPA, fused AdamW)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from experiments.versus_peft.config import Race, Racer, tokens


def prepare(folder: Path, racer: Racer, race: Race) -> tuple[Callable[[], int], Callable[[], Any]]:
    """`load() -> trained parameters` and, after it, `compiled() -> step`."""
    held: dict[str, Any] = {}

    def load() -> int:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.train()
        model.config.use_cache = False
        if racer.method == "lora":
            settings = peft.LoraConfig(r=race.rank, lora_alpha=2 * race.rank, target_modules="all-linear")
            model = peft.get_peft_model(model, settings)
        if racer.checkpointing:
            model.gradient_checkpointing_enable()
            if racer.method == "lora":
                model.enable_input_require_grads()
        held["model"] = model
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def compiled() -> Callable[[int], float]:
        model = held["model"]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=race.learning_rate, weight_decay=0.0, fused=True)

        def step(number: int) -> float:
            ids = torch.from_numpy(tokens(race, number)).long()
            # The model is given its labels already shifted, so that both sides see S positions.
            inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            loss = model(input_ids=inputs, labels=labels, shift_labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    return load, compiled
