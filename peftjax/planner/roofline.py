"""The least time of a step on a device, if nothing but one of its limits counted.

    compute = Σ over dtypes of FLOPs / devices / the device's FLOP/s of that dtype
    memory  = bytes that pass the device's memory / its bandwidth
    network = bytes that pass the device's links / the bandwidth of all of them
    step   >= max(compute, memory, network)

The bound is of the program as it is, recomputation included. How close a machine comes to it is not known
here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from peftjax.planner.collectives import Traffic
from peftjax.planner.flops import Flops
from peftjax.planner.specification import Specification


@dataclass(frozen=True)
class Roofline:
    """The three least times of a step, in seconds."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """No step takes less."""
        return max(self.compute, self.memory, self.network)

    @property
    def limit(self) -> str:
        """What bounds the step: "compute", "memory" or "network"."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(
    device: Specification, flops: Flops, moved: int, traffic: Iterable[Traffic], devices: int = 1
) -> Roofline:
    """The bound of a step.

    Args:
        device: what each of the devices can do.
        flops: of the whole step.
        moved: bytes that pass a device's memory, at least.
        traffic: what passes its links.
        devices: which share the FLOPs equally.
    """
    known = sum(flops.by_dtype.values())
    seconds = sum(count / device.rate(dtype) for dtype, count in flops.by_dtype.items())
    seconds += (flops.total - known) / device.rate("bfloat16")
    return Roofline(
        compute=seconds / devices,
        memory=moved / device.bandwidth,
        network=sum(one.crossing for one in traffic) / device.links,
    )
