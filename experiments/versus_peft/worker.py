"""One racer in a process of its own: it loads, then makes a step for every line it is sent.

Lines on standard output are JSON: one when the model is loaded, one when the step is ready
(compiled), and one a step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from experiments.versus_peft.config import Race, Racer

Step = Callable[[int], float]
"""`number of the step -> loss`."""


def memory(field: str) -> float:
    """MiB of this process: "VmRSS" now, or "VmHWM", the highest since the last `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Start "VmHWM" anew at what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Run the racer that the arguments describe."""
    folder, racer, race = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    racer, race = Racer(**racer), Race(**race)
    if racer.library == "peftjax":
        from experiments.versus_peft.jax_side import prepare
    else:
        from experiments.versus_peft.torch_side import prepare
    load, compiled = prepare(folder, racer, race)
    trained = load()
    loaded = memory("VmRSS")
    _say(loaded=loaded, trained=trained)
    started = time.perf_counter()
    step = compiled()
    _say(compile_seconds=time.perf_counter() - started)
    for number, _ in enumerate(sys.stdin):
        before = os.times()
        started = time.perf_counter()
        loss = step(number)
        seconds = time.perf_counter() - started
        after = os.times()
        _say(
            seconds=seconds,
            cpu_seconds=after.user + after.system - before.user - before.system,
            loss=loss,
            peak_above_loaded=memory("VmHWM") - loaded,
        )
        if number == 0:
            forget_peak()


def _say(**values: float) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
