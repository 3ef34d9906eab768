"""The results of the race as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import markdown


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    race = results["race"]
    lines = [
        f"LoRA rank {race['rank']} on all linear layers and full fine-tuning, batch {race['batch']} x "
        f"{race['length']}, float32, a Llama of 31.6 M parameters; {results['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        + f"; huge pages {'on' if results['huge_pages'] else 'off'}; "
        f"{results['rounds_counted']} quiet rounds of {results['rounds_tried']}.",
        "",
        *markdown.table(
            [
                "entrant",
                "s/step (median)",
                "peak above loaded, MiB",
                "after the first step, MiB",
                "compile s",
                "first loss",
                "last loss",
            ],
            map(_entrant, results["entrants"]),
        ),
        "",
        *markdown.table(
            ["peftjax / peft", "step time, median of pairs [range]", "peak memory", "after the first step"],
            map(_ratio, results["ratios"]),
        ),
    ]
    return "\n".join(lines) + "\n"


def _entrant(e: dict[str, Any]) -> list[str]:
    return [
        e["name"],
        f"{e['median_seconds']:.2f}",
        f"{e['peak_mib']:.0f}",
        f"{e['steady_peak_mib']:.0f}",
        f"{e['compile_seconds']:.1f}",
        f"{e['first_loss']:.5f}",
        f"{e['last_loss']:.5f}",
    ]


def _ratio(r: dict[str, Any]) -> list[str]:
    return [
        f"{r['method']}{' + checkpointing' if r['checkpointing'] else ''}",
        f"{r['step_time']:.2f} [{r['step_time_range'][0]:.2f}, {r['step_time_range'][1]:.2f}]",
        f"{r['peak_memory']:.2f}",
        f"{r['steady_peak_memory']:.2f}",
    ]


def plot(results: dict[str, Any], file: Path) -> None:
    """Step time and memory of every entrant, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"peftjax": "#1b6ca8", "peft": "#c8553d"}
    entrants = results["entrants"]
    names = [entrant["name"] for entrant in entrants]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    left.boxplot(
        [entrant["seconds"] for entrant in entrants], orientation="horizontal", positions=range(len(names))
    )
    right.barh(
        range(len(names)),
        [entrant["peak_mib"] for entrant in entrants],
        color=[colors[entrant["library"]] for entrant in entrants],
    )
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("seconds a step")
    left.set_xlim(left=0)
    right.set_xlabel("peak memory above the loaded model, MiB")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
