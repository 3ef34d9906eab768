"""What a device can do at most, from the vendors' pages: `machines.toml` beside this file."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from peftjax.io.files import checked

FILE = "machines.toml"


@dataclass(frozen=True)
class Specification:
    """A device, as JAX counts them.

    Attributes:
        memory: bytes that a program can use.
        flops: floating-point operations a second, without sparsity, by the dtype of what is multiplied.
        bandwidth: bytes a second of its memory.
        links: bytes a second in one direction, over all its links to other devices.
        sources: where the numbers are from.
    """

    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    links: float
    sources: tuple[str, ...]

    def rate(self, dtype: str) -> float:
        """FLOP/s of products of a dtype, by name; of one that is not listed those of bfloat16."""
        return self.flops.get(dtype, self.flops["bfloat16"])


def specifications() -> dict[str, Specification]:
    """All devices that are described, by kind: "v5e", "h200" and so on."""
    text = (resources.files("peftjax.planner") / FILE).read_text(encoding="utf-8")
    return {
        kind: checked(Specification, values, f"{FILE}: {kind}")
        for kind, values in tomllib.loads(text).items()
    }


def find_specification(target: str) -> Specification | None:
    """The device of a target, such as "v5e:16x16" or "h200:8"; None of a CPU."""
    return specifications().get(target.partition(":")[0])
