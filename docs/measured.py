"""The README's table of measurements, read from the tables in `experiments/*/results/`."""

from dataclasses import dataclass
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

Table = dict[str, dict[str, str]]
"""The cells of a table by row and column, both named by their first cell."""


@dataclass(frozen=True)
class Cell:
    """One recorded number.

    Attributes:
        name: what the README calls it.
        row: the first cell of its row.
        column: the head of its column.
        unit: what stands after the number.
    """

    name: str
    row: str
    column: str
    unit: str = ""


@dataclass(frozen=True)
class Line:
    """One row of the README's table.

    Attributes:
        what: what was measured.
        file: the recorded tables, below `experiments`.
        section: the heading above the table, empty for what stands before the first.
        cells: what is shown of it.
    """

    what: str
    file: str
    section: str
    cells: tuple[Cell, ...]


def _peaks(*rows: tuple[str, str], column: str = "peak") -> tuple[Cell, ...]:
    return tuple(Cell(name, row, column, " MiB") for name, row in rows)


BLOCKS = "step_memory/results/blocks/results.md"
METHODS = "methods/results/digits/results.md"
LINES = (
    Line(
        "Llama-3-8B, 8 x 2,048 tokens, bfloat16: peak of a step",
        BLOCKS,
        "Llama-3-8B",
        _peaks(("full", "full"), ("LoRA", "LoRA"), ("LoRA + remat", "LoRA + remat")),
    ),
    Line(
        "the same, reversible blocks or offloaded residuals",
        BLOCKS,
        "Llama-3-8B",
        _peaks(("MEFT 1 without anchors", "MEFT1, no anchors"), ("LoRA + offload", "LoRA + offload")),
    ),
    Line(
        "RoBERTa-large, 32 x 512 tokens: peak of a step",
        BLOCKS,
        "RoBERTa-large",
        _peaks(("full", "full"), ("LoRA", "LoRA"), ("S2A", "S2A"), ("LST", "LST 1/8")),
    ),
    Line(
        "ViT-L/16, 8 images: peak of a step",
        "step_memory/results/sparse/results.md",
        "ViT-L/16",
        _peaks(("masked gradients", "masked"), ("LoRA", "LoRA-8"), ("SNELL", "SNELL-8")),
    ),
    Line(
        "LLaMA-65B, 512 tokens, base in 4 bits: peak of a step in GiB",
        "quantized/results/memory/results.md",
        "65B, 1 x 512",
        (Cell("QLoRA + remat", "QLoRA + remat", "peak"), Cell("MEFT on NF4", "MEFT1, NF4", "peak")),
    ),
    Line(
        "7B Llama pre-trained in bfloat16: peak of a step",
        "step_memory/results/pretraining/results.md",
        "7B, rank 1024",
        _peaks(
            ("AdamW", "AdamW"),
            ("8-bit AdamW", "8-bit AdamW"),
            ("8-bit GaLore", "8-bit GaLore, written at each step"),
            column="peak of a step",
        ),
    ),
    Line(
        "1.3 M Llama on the bytes of WikiText-2: nats per byte",
        "pretrain_bytes/results/wikitext2/results.md",
        "",
        tuple(Cell(name, name, "test loss") for name in ("AdamW", "LoRA", "GaLore", "SwitchLoRA")),
    ),
    Line(
        "MiniLM on SST-2, 331,776 trained: accuracy in %",
        "glue_sst2/results/sparse/results.md",
        "",
        (
            Cell("full", "full", "accuracy"),
            Cell("LoRA", "LoRA r=8", "accuracy"),
            Cell("SHiRA", "SHiRA random", "accuracy"),
        ),
    ),
    Line(
        "the same, blocks rewritten",
        "glue_sst2/results/blocks/results.md",
        "",
        (Cell("Pfeiffer", "Pfeiffer 72", "accuracy"), Cell("MEFT 2", "MEFT2 36", "accuracy")),
    ),
    Line(
        "a small ViT, all methods on one table: what backward keeps, kB",
        METHODS,
        "",
        (
            Cell("LoRA", "lora", "backward keeps, kB"),
            Cell("coded residuals", "coded_residuals", "backward keeps, kB"),
            Cell("UniPT", "unipt", "backward keeps, kB"),
            Cell("MEFT", "meft", "backward keeps, kB"),
        ),
    ),
    Line(
        "the same ViT adapted to new digits: accuracy in %",
        METHODS,
        "",
        (
            Cell("full", "full", "score"),
            Cell("LoRA", "lora", "score"),
            Cell("DoRA", "dora", "score"),
            Cell("PaCA", "paca", "score"),
        ),
    ),
    Line(
        "LoRA beside PEFT on PyTorch, two CPU cores: ratio of step times, and of peaks",
        "versus_peft/results/race/results.md",
        "",
        (
            Cell("time", "lora", "step time, median of pairs [range]"),
            Cell("memory", "lora", "peak memory"),
            Cell("time with checkpointing", "lora + checkpointing", "step time, median of pairs [range]"),
        ),
    ),
    Line(
        "LoRA beside PEFT, SST-2: accuracy and deviation",
        "versus_peft/results/sst2/results.md",
        "",
        (
            Cell("peftjax", "peftjax", "accuracy: mean, deviation"),
            Cell("peft", "peft", "accuracy: mean, deviation"),
        ),
    ),
)


def table() -> str:
    """The rows, as Markdown."""
    lines = ["| measured | |", "|---|---|"]
    for line in LINES:
        rows = read(EXPERIMENTS / line.file, line.section)
        shown = [f"{cell.name} {rows[cell.row][cell.column]}{cell.unit}" for cell in line.cells]
        lines.append(f"| [{line.what}](experiments/{line.file}) | {', '.join(shown)} |")
    return "\n".join(lines)


def read(path: Path, section: str) -> Table:
    """The cells of all tables of one section; the last row of a name counts."""
    found: Table = {}
    here, columns = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            here = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if here != section or not cells:
            columns = []
        elif not columns:
            columns = cells
        elif set(line) - set("|- "):
            found[cells[0]] = dict(zip(columns, cells, strict=True))
    return found
