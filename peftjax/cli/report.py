"""What the commands print: tables for people, rows for scripts."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from peftjax.transform.registry import MethodInfo


def show(as_json: bool, value: Any, print_it: Callable[[], None]) -> None:
    """The result of a command: as JSON for scripts, or by `print_it` for people."""
    if as_json:
        print(json.dumps(value, indent=2))
    else:
        print_it()


def print_summary(summary: Mapping[str, Any]) -> None:
    """The table that a training run ends with."""
    tuned = f"{_method_name(summary['method'])} (step {summary['best_step'] or summary['steps']})"
    table = _SCORES[summary["task"]](summary, tuned)
    trained, total = summary["trainable_parameters"], summary["total_parameters"]
    table.add_row("trainable parameters", f"{trained:,} ({trained / total:.2%} of {total:,})")
    table.add_row("peak memory of the process", f"{summary['peak_host_bytes'] / 2**20:,.0f} MiB")
    if "peak_device_bytes" in summary:
        table.add_row("peak memory of the device", f"{summary['peak_device_bytes'] / 2**20:,.0f} MiB")
    counted = {"classification": "texts", "language": "counted tokens"}[summary["task"]]
    for shown, name in (("tokens", "tokens"), (counted, "labels")):
        if (rate := summary[f"{name}_per_second"]) is not None:
            table.add_row(f"{shown} per second", f"{rate:,.0f}")
    table.add_row("time", f"{summary['seconds']:.0f} s")
    table.add_row("adapter", summary["adapter"])
    Console().print(table)


def _classification_scores(summary: Mapping[str, Any], tuned: str) -> Table:
    table = Table("accuracy on held-out texts", "", title=f"{summary['data']}: {summary['eval_texts']} texts")
    table.add_row(tuned, f"{summary['accuracy']:.4f}")
    if summary["probe_accuracy"] is not None:
        table.add_row("linear probe on frozen features", f"{summary['probe_accuracy']:.4f}")
    table.add_row("majority class", f"{summary['majority_accuracy']:.4f}", end_section=True)
    return table


def _language_scores(summary: Mapping[str, Any], tuned: str) -> Table:
    title = f"{summary['data']}: {summary['eval_counted_tokens']:,} held-out tokens"
    table = Table("loss per token, perplexity, accuracy", "", title=title)
    for name, after in ((tuned, ""), ("before training", "_before")):
        scores = (summary[f"{score}{after}"] for score in ("loss", "perplexity", "token_accuracy"))
        table.add_row(name, "{:.4f}, {:.2f}, {:.4f}".format(*scores), end_section=bool(after))
    for part in ("train", "eval"):
        table.add_row(
            f"{part} rows, tokens, counted",
            f"{summary[f'{part}_rows']:,}, {summary[f'{part}_tokens']:,}, "
            f"{summary[f'{part}_counted_tokens']:,}",
        )
        cut = {name: count for name, count in summary[f"{part}_cut"].items() if count}
        if cut:
            table.add_row(f"{part} cut", ", ".join(f"{count:,} {name}" for name, count in cut.items()))
    table.add_row("slots filled in training rows", f"{summary['train_efficiency']:.1%}", end_section=True)
    return table


_SCORES = {"classification": _classification_scores, "language": _language_scores}


def print_values(values: Mapping[str, Any]) -> None:
    """A name and a value a line."""
    for name, value in values.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def print_written(written: Sequence[Mapping[str, Any]]) -> None:
    """The text of one prompt; of several each with its number; after a text shown live, its last line end."""
    if len(written) > 1:
        for number, row in enumerate(written, start=1):
            print(f"[{number}] {row['text']}")
    else:
        print(written[0]["text"] if written else "")


def method_row(info: MethodInfo) -> dict[str, Any]:
    """What the registry knows of a method, without its factory."""
    return {
        "name": info.name,
        "kind": info.kind,
        "paper": info.paper,
        "trains": info.trains,
        "backward_keeps": info.backward_keeps,
        "mergeable": info.mergeable,
        "quantized_base": info.quantized_base,
    }


def methods_markdown(methods: Mapping[str, MethodInfo]) -> str:
    """The methods table of the README."""
    lines = [
        "| method | kind | paper | trained per weight | backward keeps for it | merges | quantized base |",
        "|---|---|---|---|---|---|---|",
    ]
    for info in methods.values():
        merges, quantized = ("yes" if flag else "no" for flag in (info.mergeable, info.quantized_base))
        facts = (info.kind, info.paper, info.trains, info.backward_keeps, merges, quantized)
        lines.append(f"| `{info.name}` | {' | '.join(facts)} |")
    return "\n".join(lines)


def print_methods(methods: Mapping[str, MethodInfo]) -> None:
    """The methods as a table for a terminal."""
    table = Table("method", "kind", "paper", "trained per weight", "backward keeps for it")
    for info in methods.values():
        table.add_row(info.name, info.kind, info.paper, info.trains, info.backward_keeps)
    Console().print(table)


def print_inspection(found: Mapping[str, Any]) -> None:
    """The parameters as a table, and the totals."""
    table = Table(Column("parameter", no_wrap=True), "shape", found["method"], "axes", "why it is left out")
    for row in found["parameters"]:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["parameter"], shape, row["becomes"], row.get("axes", ""), row.get("why", ""))
    Console().print(table)
    trained, total = found["trainable_parameters"], found["total_parameters"]
    print(f"{trained:,} trainable parameters beside {total:,}: {trained / total:.3%}")
    print("axes: s stack (layers, experts), i input, o output")


def _method_name(method: Mapping[str, Any]) -> str:
    if method["name"] != "chain":
        return str(method["name"])
    return " + ".join(_method_name(part) for part in method["methods"])
