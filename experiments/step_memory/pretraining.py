"""What pre-training a Llama needs with each optimizer, beside what GaLore's paper says.

The Llamas of 60 million to 7 billion parameters of that paper, one row of 256 tokens, parameters and
optimizer state in bfloat16, each block recomputed in the backward pass, the loss over 512 tokens at a time.
What a method does between steps, such as a new projection, is one or more programs of its own, of which the
table has the largest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

import peftjax as pj
from experiments.harness.contenders import Contender, Setting
from experiments.harness.memory import Model, Plans, Table, memory_report, peaks
from experiments.harness.plot import saved, stacked_bars
from experiments.harness.pretraining import (
    adamw8bit,
    full,
    galore,
    lion8bit,
    lora,
    natural_galore,
    optax_galore,
    restarts,
    row_adamw,
    switchlora,
    with_rest,
)
from experiments.harness.report import table
from experiments.step_memory.models import SIZES, Size
from peftjax.transform.transform import Frozen, Params, Trainable

MIB, GIB = 2**20, 2**30
BASE, GALORE, EIGHT_BIT = "AdamW", "GaLore", "8-bit GaLore"
WRITTEN = ", written at each step"
HEADER = (
    "",
    "beside the weights",
    "/ AdamW",
    "weights and that",
    "temporaries",
    "peak of a step",
    "/ AdamW",
    "peak between steps",
)
LESS = {"beside": ("optimizer state", 0.825), "peak": ("in all", 0.633)}
"""What the paper says 8-bit GaLore needs less than AdamW in bfloat16."""
CARD = 24 * GIB
"""The card that holds the training of 7B with 8-bit GaLore, says the paper."""


def optax_as_it_is(setting: Setting, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """`optax.contrib.galore` on the stacked parameters."""
    return optax.contrib.galore(rate, rank=setting.rank, update_proj_gap=setting.every, scale=setting.scale)


def bfloat16_galore(setting: Setting, **options: Any) -> pj.Transform:
    """GaLore with projectors and displacements in bfloat16, new ones for a parameter at a time."""
    return galore(setting, dtype="bfloat16", **{"together": 1, "basis": "auto", **options})


def bfloat16_natural(setting: Setting) -> pj.Transform:
    """Natural GaLore with projectors, displacements and history in bfloat16."""
    return natural_galore(setting, dtype="bfloat16", together=1, basis="auto")


def bfloat16_lora(setting: Setting) -> pj.Transform:
    """LoRA with factors in bfloat16, as the paper counts them."""
    whole = pj.lora(rank=setting.rank, alpha=setting.rank)

    def init(key: jax.Array, params: Params) -> tuple[Frozen, Trainable]:
        frozen, trainable = whole.init(key, params)
        return frozen, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), trainable)

    return with_rest(dataclasses.replace(whole, init=init))


written = partial(bfloat16_galore, write="step")
"""Put into the weights at each step, as the authors' code does."""
CONTENDERS = tuple(
    dataclasses.replace(contender, remat="nothing_saveable")
    for contender in (
        Contender("AdamW", full),
        Contender("8-bit AdamW", full, adamw8bit),
        Contender("GaLore", bfloat16_galore),
        Contender("GaLore, written at each step", written),
        Contender("8-bit GaLore", bfloat16_galore, adamw8bit),
        Contender("8-bit GaLore, written at each step", written, adamw8bit),
        Contender("8-bit GaLore, bases all together", partial(bfloat16_galore, together=None), adamw8bit),
        Contender("8-bit GaLore, bases by iteration", partial(bfloat16_galore, basis="subspace"), adamw8bit),
        Contender("GaLore with 8-bit Lion", bfloat16_galore, lion8bit),
        Contender("Natural GaLore", bfloat16_natural),
        Contender("optax.contrib.galore, as it is", full, optax_as_it_is),
        Contender("optax.contrib.galore, per matrix", full, optax_galore),
        Contender("LoRA", lora),
        Contender("LoRA, factors in bfloat16", bfloat16_lora),
        Contender("low-rank restarts", restarts),
        Contender("SwitchLoRA", switchlora, row_adamw),
    )
)
LABELS = tuple(contender.label for contender in CONTENDERS)


def report(plans: Plans) -> str:
    """The plans in Markdown, models and rows in their order."""
    some = next(plan for rows in plans.values() for plan in rows.values() if "peak" in plan)
    commits = sorted({plan["commit"] for rows in plans.values() for plan in rows.values() if "peak" in plan})
    lines = [
        f"One training step on 256 tokens as compiled for {some['device']} by jax {some['jax']}; MiB; "
        f"commit {', '.join(commits)}. Parameters and optimizer state in bfloat16, factors in float32 as the "
        "library keeps them where nothing else is said. Beside the weights: optimizer state, projections, "
        "factors and displacements, all that stays between steps but the model's own parameters. Temporaries "
        "have the gradients. The peak of a step is arguments, temporaries and what is not written in place; "
        "what a method does between steps (new projections, a restart) are programs of their own, of which "
        "the table has the largest.",
        "",
    ]
    for size in SIZES:
        if (rows := plans.get(size.name)) is None:
            continue
        ordered = [name for name in LABELS if name in rows]
        cells = [_cells(name, rows) for name in ordered if "peak" in rows[name]]
        reasons = [f"- {name}: {rows[name]['reason']}" for name in ordered if "reason" in rows[name]]
        title = f"## {size.name}, rank {size.rank}"
        lines += [title, "", *table(HEADER, cells), "", *reasons, *([""] if reasons else [])]
    found = [*stated_tables(plans), *claims(plans)]
    return "\n".join([*lines, "## What the paper says", "", *(f"- {line}" for line in found), ""])


def _cells(name: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    plan, base = rows[name], rows.get(BASE)

    def mib(size: int) -> str:
        return f"{size / MIB:,.0f}"

    def share(part: str) -> str:
        return f"{plan[part] / base[part]:.3f}" if base else ""

    return [
        name,
        mib(plan["beside"]),
        share("beside"),
        mib(plan["model"] + plan["beside"]),
        mib(plan["bytes"]["temporaries"]),
        mib(plan["peak"]),
        share("peak"),
        "not measured" if plan["between"] is None else ", ".join(map(mib, sorted(plan["between"])[-1:])),
    ]


def stated_tables(plans: Plans) -> list[str]:
    """Weights and optimizer state beside the paper's table, whose unit is not said."""
    found = []
    for size in SIZES:
        full, galore = size.paper or (0.0, 0.0)
        for name, stated in ((BASE, full), (GALORE, galore), (GALORE + WRITTEN, galore)):
            plan = plans.get(size.name, {}).get(name)
            if stated and plan and "peak" in plan:
                own = plan["model"] + plan["beside"]
                found.append(
                    f"{size.name}, {name}, weights and state: the paper {stated:.2f} G, "
                    f"here {own / GIB:.2f} GiB ({own / 1e9:.2f} GB)."
                )
    return found


def claims(plans: Plans) -> list[str]:
    """The paper's shares, and the card that holds 7B."""
    shares = [line for row in (EIGHT_BIT, EIGHT_BIT + WRITTEN) for line in _shares(plans, row)]
    return [*shares, *_held(plans.get(SIZES[-1].name, {}))]


def _shares(plans: Plans, row: str) -> Iterator[str]:
    """What the paper says that a row saves, beside the sizes that are measured, if any is."""
    for part, (what, stated) in LESS.items():
        less = {
            size.name: 1 - rows[row][part] / rows[BASE][part]
            for size in SIZES
            if (rows := plans.get(size.name, {})) and all("peak" in rows.get(one, {}) for one in (row, BASE))
        }
        if less:
            held = [name for name, share in less.items() if share >= stated]
            measured = ", ".join(f"{name} {share:.1%}" for name, share in less.items())
            verdict = f"reached by {', '.join(held)}" if held else "reached by none"
            yield f"{row}, {stated:.1%} less {what} than AdamW: {verdict} ({measured})."


def _held(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What the largest model needs, beside a card's memory."""
    most = {
        name: max(plan["peak"], *plan["between"], 0)
        for name, plan in rows.items()
        if "peak" in plan and plan["between"] is not None
    }
    found = [
        f"{SIZES[-1].name} with {name} within a card of 24 GiB: "
        f"{'confirmed' if most[name] <= CARD else 'not confirmed'} (a step {rows[name]['peak'] / GIB:.1f} "
        f"GiB, the most that is needed {most[name] / GIB:.1f} GiB or {most[name] / 1e9:.1f} GB; the paper "
        "22.7 to 22.8 GB)."
        for name in (EIGHT_BIT, EIGHT_BIT + WRITTEN)
        if name in most
    ]
    if fits := [name for name, size in most.items() if size <= CARD]:
        found.append(f"{SIZES[-1].name} within a card of 24 GiB: {'; '.join(fits)}.")
    return found


def draw(plans: Plans, file: Path) -> None:
    """The peak of a step of every contender, by kind."""
    names = [size.name for size in SIZES if size.name in plans]
    with saved(file, len(names), size=(5 * len(names), 5)) as (figure, axes):
        for axis, name in zip(axes, names):
            rows = plans[name]
            stacked_bars(axis, {label: rows[label] for label in LABELS if "peak" in rows.get(label, {})}, GIB)
            axis.set_title(name)
            axis.set_xlabel("peak of a step, GiB")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def answer(plans: Plans) -> dict[str, str]:
    """The peaks of a few contenders on the largest model."""
    chosen = (BASE, "8-bit AdamW", GALORE, EIGHT_BIT, EIGHT_BIT + WRITTEN, "GaLore with 8-bit Lion", "LoRA")
    return peaks(plans, SIZES[-1].name, chosen)


REPORT = memory_report(report, draw, answer)


def make_table(
    sizes: tuple[Size, ...] = SIZES, every: int = 200, scale: float = 0.25, steps: int = 10_000
) -> Table:
    """The contenders on Llamas, each with its rank."""
    ranks = {size.name: size.rank for size in sizes}

    def setting(model: Model) -> Setting:
        return Setting(steps, rank=ranks[model.name], every=every, scale=scale)

    return Table(tuple(size.model for size in sizes), CONTENDERS, REPORT, setting=setting)
