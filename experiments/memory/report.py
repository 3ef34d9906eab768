"""The measured memory as tables and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.bars import stacked_bars
from experiments.markdown import table
from experiments.memory.rows import ROWS

Results = dict[str, dict[str, dict[str, Any]]]
"""A plan, or the reason why there is none, by model and row."""
MIB = 2**20
HEADER = (
    "",
    "trained",
    "weights",
    "optimizer",
    "activations",
    "/ full",
    "temporaries",
    "on the host",
    "peak",
    "/ full",
    "TFLOP",
    "the paper's claim",
)


def report(results: Results) -> str:
    """The results in Markdown, the rows in their order."""
    some = next(plan for rows in results.values() for plan in rows.values() if "peak" in plan)
    lines = [
        f"One training step as compiled for {some['device']} by jax {some['jax']}; MiB. Weights are all "
        "frozen and trained parameters. Activations are what the forward pass keeps for the backward pass; "
        "temporaries have them, the gradients, and what one layer needs while it works, as far as they are "
        "on the device.",
        "",
    ]
    for name, rows in results.items():
        ordered = [row for row in ROWS if row.name in rows]
        cells = [_cells(row.name, str(row.claim or ""), rows) for row in ordered if "peak" in rows[row.name]]
        reasons = [
            f"- {row.name}: {rows[row.name]['reason']}" for row in ordered if "reason" in rows[row.name]
        ]
        lines += [f"## {name}", "", *table(HEADER, cells), "", *reasons, *([""] if reasons else [])]
    return "\n".join([*lines, "## Claims", "", *(f"- {claim}" for claim in claims(results)), ""])


def claims(results: Results) -> list[str]:
    """The papers' claims that have a number, each with what was measured."""
    found = []
    for row in ROWS:
        if row.claim is None:
            continue
        less = {
            model: 1 - rows[row.name][row.claim.of] / rows["full"][row.claim.of]
            for model, rows in results.items()
            if all("peak" in rows.get(name, {}) for name in (row.name, "full"))
        }
        if less:
            holds = all(share >= row.claim.share for share in less.values())
            measured = ", ".join(f"{model} {share:.1%}" for model, share in less.items())
            verdict = "confirmed" if holds else "not confirmed on all"
            found.append(f"{row.name}, {row.claim}: {verdict} ({measured}).")
    return found


def _cells(name: str, claim: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    plan, full = rows[name], rows.get("full", {})
    sizes = plan["bytes"]

    def share(part: str) -> str:
        return f"{plan[part] / full[part]:.3f}" if part in full else ""

    def mib(size: int) -> str:
        return f"{size / MIB:,.0f}"

    return [
        name,
        f"{plan['trainable_parameters']:,}",
        mib(sizes["weights"] + sizes["method_state"] + sizes["trainable"]),
        mib(sizes["optimizer"]),
        mib(plan["kept"]),
        share("kept"),
        mib(sizes["temporaries"]),
        mib(sizes.get("host", 0)),
        mib(plan["peak"]),
        share("peak"),
        f"{plan['flops'] / 1e12:,.1f}",
        claim,
    ]


def plot(results: Results, file: Path) -> None:
    """The peak of every row, by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(5 * len(results), 5), layout="constrained", squeeze=False
    )
    for axis, (model, rows) in zip(axes[0], results.items()):
        found = {row.name: rows[row.name] for row in ROWS if "peak" in rows.get(row.name, {})}
        stacked_bars(axis, found, 2**30)
        axis.set_title(model)
        axis.set_xlabel("peak, GiB")
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
