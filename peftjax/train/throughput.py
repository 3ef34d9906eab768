"""How fast a run is, and the memory that it needs at its peak."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass
class Throughput:
    """Tokens (no padding) and labels (by weight) per second, of the steps that do not compile.

    Steps run asynchronously: around whatever is not to be timed, they are waited for.
    """

    tokens: int = 0
    labels: float = 0.0
    seconds: float = 0.0
    started: float | None = None
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    latest: Any = None

    def before(self, batch: Mapping[str, Any]) -> None:
        """A step begins; the first with a new shape compiles, which is not timed."""
        if batch["input_ids"].shape not in self.shapes:
            jax.block_until_ready(self.latest)
            self.stop()

    def after(self, batch: Mapping[str, Any], outputs: Any) -> None:
        """The step has been dispatched; `outputs` is something of it to wait for."""
        self.latest = outputs
        if batch["input_ids"].shape in self.shapes:
            self.tokens += int(batch["attention_mask"].sum())
            self.labels += float(batch["weights"].sum())
            return
        self.shapes.add(batch["input_ids"].shape)
        jax.block_until_ready(outputs)
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
        self.started = None

    def take(self) -> dict[str, float | None]:
        """The rates since the last `take`, None where nothing was timed."""
        timed = self.tokens > 0 and self.seconds > 0
        rates = {
            "tokens_per_second": self.tokens / self.seconds if timed else None,
            "labels_per_second": self.labels / self.seconds if timed else None,
        }
        self.tokens, self.labels, self.seconds = 0, 0.0, 0.0
        return rates


def peak_memory() -> dict[str, int]:
    """Bytes at the peak so far: of this process, and of the fullest device where it tells."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB, on macOS in bytes
    peak = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    on_devices = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    if on_devices:
        peak["peak_device_bytes"] = max(on_devices)
    return peak
