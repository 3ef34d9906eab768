r"""How do LoRA and full fine-tuning in peftjax compare with Hugging Face's PEFT, in time and memory?

    pip install -e ".[train,experiments]" "torch==2.13.0" "transformers>=5" "peft>=0.21"
    python -m experiments.versus_peft.run
    python -m experiments.versus_peft.sst2 --train train.tsv --evaluation dev.tsv --steps 150

Expected, peftjax divided by peft, and the accuracy of both:

    | results | of | is |
    |---|---|---|
    | race | lora | time x 0.80, memory x 0.46 |
    | race | full | time x 0.82, memory x 0.74 |
    | race | lora + checkpointing | time x 0.47, memory x 0.45 |
    | race | full + checkpointing | time x 0.58, memory x 0.76 |
    | sst2 | peftjax on SST-2 | 82.3 ± 0.2 % |
    | sst2 | peft on SST-2 | 82.5 ± 1.0 % |

In the race every contender runs in a process of its own and all start from one checkpoint. A round is one
step of each, the order reversed every time; while one works the others wait. A round counts when no other
process used more than `--noise` cores during any of its steps. A ratio is the median over the rounds of the
ratio of two steps of the same round. Memory is the highest resident set of the process minus the one after
loading the model. `experiments.versus_peft.sst2` says how accuracies are compared.
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
from pathlib import Path
from typing import Any

import tyro
from rich.progress import track

from experiments.harness.record import provenance
from experiments.harness.report import write_report
from experiments.versus_peft import sst2
from experiments.versus_peft.config import Race, Racer, write_checkpoint
from experiments.versus_peft.report import REPORT

RACERS = tuple(
    Racer(library, method, checkpointing)
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
    """A running racer."""

    def __init__(self, racer: Racer, folder: Path, race: Race, huge_pages: bool) -> None:
        self.racer = racer
        environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES} if huge_pages else dict(os.environ)
        settings = [json.dumps(dataclasses.asdict(value)) for value in (racer, race)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.versus_peft.worker", str(folder), *settings],
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
            raise RuntimeError(f"{self.racer.name} ended with exit code {self.process.wait()}")
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
            Worker(racer, Path(folder), options.race, options.huge_pages)
            for racer in track(RACERS, "loading and compiling")
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
    print(write_report(options.output, REPORT, results))


def _summary(
    options: Options,
    workers: list[Worker],
    first: list[dict[str, float]],
    rounds: list[list[dict[str, float]]],
) -> dict[str, Any]:
    clean = [steps for steps in rounds if all(step["others"] <= options.noise for step in steps)]
    if not clean:
        raise SystemExit(f"none of {len(rounds)} rounds was quiet enough; stop other work or raise --noise")
    racers = []
    for place, worker in enumerate(workers):
        seconds = [steps[place]["seconds"] for steps in clean]
        racers.append(
            {
                **dataclasses.asdict(worker.racer),
                "name": worker.racer.name,
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
    by_kind = {(e["library"], e["method"], e["checkpointing"]): e for e in racers}
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
        **provenance("jax", "torch", "transformers", "peft"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "race": dataclasses.asdict(options.race),
        "huge_pages": options.huge_pages,
        "rounds_tried": len(rounds),
        "rounds_counted": len(clean),
        "noise": options.noise,
        "racers": racers,
        "ratios": ratios,
    }


REPORTS = {"race": REPORT, "sst2": sst2.REPORT}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
