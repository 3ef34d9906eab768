"""The results of the race as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.harness.plot import saved
from experiments.harness.report import Report, Results, table


def make_report(results: Results) -> str:
    """The results in Markdown."""
    race = results["race"]
    lines = [
        f"LoRA rank {race['rank']} on all linear layers and full fine-tuning, batch {race['batch']} x "
        f"{race['length']}, float32, a Llama of 31.6 M parameters; {results['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        + f"; huge pages {'on' if results['huge_pages'] else 'off'}; "
        f"{results['rounds_counted']} quiet rounds of {results['rounds_tried']}.",
        "",
        *table(
            [
                "contender",
                "s/step (median)",
                "peak above loaded, MiB",
                "after the first step, MiB",
                "compile s",
                "first loss",
                "last loss",
            ],
            map(_row, results["racers"]),
        ),
        "",
        *table(
            ["peftjax / peft", "step time, median of pairs [range]", "peak memory", "after the first step"],
            map(_ratio, results["ratios"]),
        ),
    ]
    return "\n".join(lines) + "\n"


def _row(e: dict[str, Any]) -> list[str]:
    return [
        e["name"],
        f"{e['median_seconds']:.2f}",
        f"{e['peak_mib']:.0f}",
        f"{e['steady_peak_mib']:.0f}",
        f"{e['compile_seconds']:.1f}",
        f"{e['first_loss']:.5f}",
        f"{e['last_loss']:.5f}",
    ]


def _name(ratio: dict[str, Any]) -> str:
    return f"{ratio['method']}{' + checkpointing' if ratio['checkpointing'] else ''}"


def _ratio(r: dict[str, Any]) -> list[str]:
    return [
        _name(r),
        f"{r['step_time']:.2f} [{r['step_time_range'][0]:.2f}, {r['step_time_range'][1]:.2f}]",
        f"{r['peak_memory']:.2f}",
        f"{r['steady_peak_memory']:.2f}",
    ]


def draw(results: Results, file: Path) -> None:
    """Step time and memory of every racer, side by side."""
    colors = {"peftjax": "#1b6ca8", "peft": "#c8553d"}
    racers = results["racers"]
    places = range(len(racers))
    with saved(file, 2, size=(11, 4), sharey=True) as (_, (left, right)):
        left.boxplot([racer["seconds"] for racer in racers], orientation="horizontal", positions=places)
        peaks = [racer["peak_mib"] for racer in racers]
        right.barh(places, peaks, color=[colors[racer["library"]] for racer in racers])
        left.set_yticks(places, [racer["name"] for racer in racers])
        left.invert_yaxis()
        left.set_xlabel("seconds a step")
        left.set_xlim(left=0)
        right.set_xlabel("peak memory above the loaded model, MiB")


def answer(results: Results) -> dict[str, str]:
    """Time and memory, peftjax divided by peft."""
    return {
        _name(ratio): f"time x {ratio['step_time']:.2f}, memory x {ratio['peak_memory']:.2f}"
        for ratio in results["ratios"]
    }


REPORT = Report(make_report, draw, answer)
