"""The measured memory of pre-training as tables and a plot, beside what GaLore's paper says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.bars import stacked_bars
from experiments.markdown import table
from experiments.pretrain.memory_rows import ROWS
from experiments.pretrain.sizes import SIZES

Results = dict[str, dict[str, dict[str, Any]]]
"""A plan, or the reason why there is none, by model and row."""
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


def report(results: Results) -> str:
    """The results in Markdown, models and rows in their order."""
    some = next(plan for rows in results.values() for plan in rows.values() if "peak" in plan)
    commits = sorted(
        {plan["commit"] for rows in results.values() for plan in rows.values() if "peak" in plan}
    )
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
        if (rows := results.get(size.name)) is None:
            continue
        ordered = [row.name for row in ROWS if row.name in rows]
        cells = [_cells(name, rows) for name in ordered if "peak" in rows[name]]
        reasons = [f"- {name}: {rows[name]['reason']}" for name in ordered if "reason" in rows[name]]
        title = f"## {size.name}, rank {size.rank}"
        lines += [title, "", *table(HEADER, cells), "", *reasons, *([""] if reasons else [])]
    found = [*stated_tables(results), *claims(results)]
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


def stated_tables(results: Results) -> list[str]:
    """Weights and optimizer state beside the paper's table, whose unit is not said."""
    found = []
    for size in SIZES:
        full, galore = size.paper or (0.0, 0.0)
        for name, stated in ((BASE, full), (GALORE, galore), (GALORE + WRITTEN, galore)):
            plan = results.get(size.name, {}).get(name)
            if stated and plan and "peak" in plan:
                own = plan["model"] + plan["beside"]
                found.append(
                    f"{size.name}, {name}, weights and state: the paper {stated:.2f} G, "
                    f"here {own / GIB:.2f} GiB ({own / 1e9:.2f} GB)."
                )
    return found


def claims(results: Results) -> list[str]:
    """The paper's shares, and the card that holds 7B."""
    shares = [line for row in (EIGHT_BIT, EIGHT_BIT + WRITTEN) for line in _shares(results, row)]
    return [*shares, *_held(results.get(SIZES[-1].name, {}))]


def _shares(results: Results, row: str) -> Iterator[str]:
    """What the paper says that a row saves, beside the sizes that are measured, if any is."""
    for part, (what, stated) in LESS.items():
        less = {
            size.name: 1 - rows[row][part] / rows[BASE][part]
            for size in SIZES
            if (rows := results.get(size.name, {}))
            and all("peak" in rows.get(one, {}) for one in (row, BASE))
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


def plot(results: Results, file: Path) -> None:
    """The peak of a step of every row, by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [size.name for size in SIZES if size.name in results]
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(5 * len(names), 5), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names):
        rows = results[name]
        stacked_bars(
            axis, {row.name: rows[row.name] for row in ROWS if "peak" in rows.get(row.name, {})}, GIB
        )
        axis.set_title(name)
        axis.set_xlabel("peak of a step, GiB")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
