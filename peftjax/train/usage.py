"""What a run uses: tokens per second and peak memory."""

import resource
import sys
import time
from dataclasses import dataclass

import jax


@dataclass
class Throughput:
    """Tokens per second, over the time between `start` and `stop` only."""

    tokens: int = 0
    seconds: float = 0.0
    started: float | None = None

    def start(self) -> None:
        """Time runs."""
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Time stands still, for example while a program compiles."""
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
        self.started = None

    def add(self, tokens: int) -> None:
        """Tokens computed while time runs."""
        self.tokens += tokens

    def take(self) -> float | None:
        """Tokens per second since the last `take`, None where nothing was timed."""
        rate = self.tokens / self.seconds if self.tokens and self.seconds > 0 else None
        self.tokens, self.seconds = 0, 0.0
        return rate


def peak_memory() -> dict[str, int]:
    """Bytes at the peak so far: of this process, and of the fullest device where it tells."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB, on macOS in bytes
    peak = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    on_devices = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    if on_devices:
        peak["peak_device_bytes"] = max(on_devices)
    return peak
