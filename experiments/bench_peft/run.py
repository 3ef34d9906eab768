"""Race peftjax against Hugging Face's PEFT, step by step in turn, and write what was measured.

    pip install -e ".[train,experiments]" "torch==2.13.0" "transformers>=5" "peft>=0.21"
    python -m experiments.bench_peft.run --output experiments/bench_peft/results

Every entrant runs in a process of its own and all start from one checkpoint. A round is one step of each,
the order turned round every time; while one works the others wait. A round counts when no other
process used more than `--noise` cores during any of its steps. A ratio is the median over the rounds of
the ratio of two steps of the same round. Memory is the highest resident set of the process minus
the one after loading the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro
from rich.progress import track

from experiments.bench_peft.config import Entrant, Race, write_checkpoint
from experiments.bench_peft.report import plot, table

ENTRANTS = tuple(
    Entrant(library, method, checkpointing)
    for checkpointing in (False, True)
    for method in ("lora", "full")
    for library in ("peftjax", "peft")
)
HUGE_PAGES = "glibc.malloc.hugetlb=1"


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to race, and how."""

    output: Path = Path("experiments/bench_peft/results")
    """Where results.json, results.md and results.png go."""
    rounds: int = 12
    """Rounds that must count."""
    most_rounds: int = 40
    """Rounds to try at most."""
    noise: float = 0.15
    """Cores that other processes may use during a step that counts."""
    rest: float = 0.3
    """Seconds between steps, in which the threads of the last one go to sleep."""
    huge_pages: bool = True
    """Give every process, of both libraries, huge pages (GLIBC_TUNABLES=glibc.malloc.hugetlb=1)."""
    race: Race = dataclasses.field(default_factory=Race)
    """What is trained."""


class Worker:
    """A running entrant."""

    def __init__(self, entrant: Entrant, folder: Path, race: Race, huge_pages: bool) -> None:
        self.entrant = entrant
        environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES} if huge_pages else dict(os.environ)
        settings = [json.dumps(dataclasses.asdict(value)) for value in (entrant, race)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.bench_peft.worker", str(folder), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.start = {**self._answer(), **self._answer()}

    def step(self) -> dict[str, float]:
        """One step, and how many cores other processes used meanwhile."""
        machine, clock = _busy_seconds(), time.perf_counter()
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._answer()
        elapsed = time.perf_counter() - clock
        others = (_busy_seconds() - machine - answer["cpu_seconds"]) / elapsed
        return {**answer, "others": max(0.0, others)}

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.entrant.name} ended with exit code {self.process.wait()}")
        return json.loads(line)


def _busy_seconds() -> float:
    """Seconds of processor time used on this machine since it started, stolen time included."""
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    """Model, family and number of the processor: the ratios depend on it."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    facts = {name.strip(): value.strip() for name, value in lines}
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def main(options: Options) -> None:
    """Race, and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        workers = [
            Worker(entrant, Path(folder), options.race, options.huge_pages)
            for entrant in track(ENTRANTS, "loading and compiling")
        ]
        first = [worker.step() for worker in workers]  # warm: allocations, lazy set-up
        rounds: list[list[dict[str, float]]] = []
        counted = 0
        for number in track(range(options.most_rounds), "racing"):
            order = list(range(len(workers)))[:: 1 if number % 2 == 0 else -1]
            steps: dict[int, dict[str, float]] = {}
            for place in order:
                time.sleep(options.rest)
                steps[place] = workers[place].step()
            rounds.append([steps[place] for place in range(len(workers))])
            counted += all(step["others"] <= options.noise for step in rounds[-1])
            if counted == options.rounds:
                break
        for worker in workers:
            worker.stop()
    results = _summary(options, workers, first, rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "results.md").write_text(table(results))
    plot(results, options.output / "results.png")
    print(table(results))


def _summary(
    options: Options,
    workers: list[Worker],
    first: list[dict[str, float]],
    rounds: list[list[dict[str, float]]],
) -> dict[str, Any]:
    clean = [steps for steps in rounds if all(step["others"] <= options.noise for step in steps)]
    if not clean:
        raise SystemExit(f"none of {len(rounds)} rounds was quiet enough; stop other work or raise --noise")
    entrants = []
    for place, worker in enumerate(workers):
        seconds = [steps[place]["seconds"] for steps in clean]
        entrants.append(
            {
                **dataclasses.asdict(worker.entrant),
                "name": worker.entrant.name,
                "trained": worker.start["trained"],
                "loaded_mib": worker.start["loaded"],
                "compile_seconds": worker.start["compile_seconds"],
                "first_step_seconds": first[place]["seconds"],
                "first_loss": first[place]["loss"],
                "last_loss": rounds[-1][place]["loss"],
                "seconds": seconds,
                "median_seconds": statistics.median(seconds),
                "peak_mib": max(
                    step["peak_above_loaded"] for step in [first[place], *(s[place] for s in rounds)]
                ),
                "steady_peak_mib": max(steps[place]["peak_above_loaded"] for steps in rounds),
            }
        )
    by_kind = {(e["library"], e["method"], e["checkpointing"]): e for e in entrants}
    ratios = []
    for (library, method, checkpointing), ours in by_kind.items():
        if library != "peftjax":
            continue
        theirs = by_kind["peft", method, checkpointing]
        paired = [a / b for a, b in zip(ours["seconds"], theirs["seconds"])]
        ratios.append(
            {
                "method": method,
                "checkpointing": checkpointing,
                "step_time": statistics.median(paired),
                "step_time_range": [min(paired), max(paired)],
                "peak_memory": ours["peak_mib"] / theirs["peak_mib"],
                "steady_peak_memory": ours["steady_peak_mib"] / theirs["steady_peak_mib"],
            }
        )
    return {
        "race": dataclasses.asdict(options.race),
        "huge_pages": options.huge_pages,
        "rounds_tried": len(rounds),
        "rounds_counted": len(clean),
        "noise": options.noise,
        "machine": f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("jax", "torch", "transformers", "peft")},
        "entrants": entrants,
        "ratios": ratios,
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
