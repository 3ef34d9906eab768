"""What a plan says of a step: where its memory goes, what passes between devices, its least time."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftjax.planner.collectives import Traffic
from peftjax.planner.roofline import Roofline


@dataclass(frozen=True)
class Bytes:
    """Where a step's memory goes, in bytes of the device, its layout's filling included.

    Attributes:
        weights: the frozen parameters.
        method_state: what else the method holds: indices, a frozen factor, weights that its advance changes.
        trainable: what is trained.
        optimizer: the optimizer's state, as far as it is on the device.
        batch: the batch.
        arguments: all of the above, as the compiler counts it.
        temporaries: what the step holds while it works, gradients and residuals included.
        outputs: all that the step returns.
        aliased: the part of `outputs` that is written over a donated argument.
        code: the program, where it lies in the device's memory (TPU); not in `peak`.
        host: what lies in the host's memory, where a policy such as "offload_attention" puts temporaries and
            `optimizer_memory` the optimizer's state; not in `peak`.
    """

    weights: int
    method_state: int
    trainable: int
    optimizer: int
    batch: int
    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int
    host: int

    @property
    def peak(self) -> int:
        """The device memory that one step needs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


@dataclass(frozen=True)
class Plan:
    """What a step needs on a target; `str` is a table.

    Attributes:
        method: the method's name.
        target: the target's name.
        device: the device's own name.
        bytes: memory by kind.
        kept: the residuals of the backward pass, as traced, without the step's own inputs: activations, in
            bytes. `bytes.temporaries` has them too, and what one layer needs while it works.
        flops: of the products of one step, what is recomputed included; see `peftjax.planner.flops`.
        uncounted: operations that `flops` leaves out.
        trainable_parameters: how many numbers are trained.
        compile_seconds: what the compiler took for the step.
        between: the peaks of the programs that the method runs before a step (its advances), each counted as
            that of the step.
        devices: of the mesh; `bytes` and `moved` are those of one of them, `kept` and `flops` those of all.
        collectives: what passes between them, by kind; None, with a warning, where this jax cannot read the
            program of a newer compiler.
        items: tokens of `input_ids` in a batch, and of a batch without them its rows.
        unit: "tokens" or "rows".
        moved: bytes that pass a device's memory in a step, at least.
        capacity: of a device, in bytes; None where it is not known.
        roofline: the least time of a step; None where the device's limits are not known, or `collectives`.
    """

    method: str
    target: str
    device: str
    bytes: Bytes
    kept: int
    flops: int
    uncounted: tuple[str, ...]
    trainable_parameters: int
    compile_seconds: float
    between: tuple[int, ...] = ()
    devices: int = 1
    collectives: Mapping[str, Traffic] | None = field(default_factory=dict)
    items: int = 0
    unit: str = "tokens"
    moved: int = 0
    capacity: int | None = None
    roofline: Roofline | None = None

    @property
    def needed(self) -> int:
        """Bytes that a device has to have: of the step with its program, or of what is done between steps."""
        return max(self.bytes.peak + self.bytes.code, *self.between, 0)

    @property
    def fits(self) -> bool | None:
        """Whether the step, its program and what is done between steps fit; None of unknown capacity."""
        if self.capacity is None:
            return None
        return self.needed <= self.capacity

    @property
    def most_per_second(self) -> float | None:
        """Tokens (or rows) a second of all devices, if a step took the roofline's time."""
        return None if self.roofline is None else self.items / self.roofline.seconds

    def __str__(self) -> str:
        sizes = self.bytes
        rows = [
            ("weights", sizes.weights),
            ("method state", sizes.method_state),
            ("trainable", sizes.trainable),
            ("optimizer", sizes.optimizer),
            ("batch", sizes.batch),
            ("temporaries", sizes.temporaries),
            ("  kept for backward", self.kept // self.devices),
            ("outputs not aliased", sizes.outputs - sizes.aliased),
            ("peak", sizes.peak),
            *((("peak between steps", max(self.between)),) if self.between else ()),
            ("code, on top", sizes.code),
            ("on the host", sizes.host),
            *(() if self.capacity is None else (("capacity", self.capacity),)),
        ]
        where = self.device if self.devices == 1 else f"{self.devices} x {self.device}, each"
        left_out = f", without {', '.join(self.uncounted)}" if self.uncounted else ""
        return "\n".join(
            [
                f"{self.method} on {self.target} ({where}), {self.trainable_parameters:,} trained",
                *(f"  {name:<20}{size / 2**20:>12,.2f} MiB" for name, size in rows),
                *(
                    f"  {kind:<20}{traffic.nbytes / 2**20:>12,.2f} MiB in {traffic.runs:,}"
                    for kind, traffic in (self.collectives or {}).items()
                ),
                f"  {'FLOPs a step':<20}{self.flops:>12.4g}{left_out}",
                *self._bound(),
                f"  {'compiled in':<20}{self.compile_seconds:>12.1f} s",
            ]
        )

    def _bound(self) -> list[str]:
        """The lines of the roofline and of whether the step fits."""
        fits = [] if self.fits is None else [f"  {'fits':<20}{'yes' if self.fits else 'no':>12}"]
        if self.roofline is None:
            return fits
        bound = self.roofline
        parts = f"compute {bound.compute:.4g}, memory {bound.memory:.4g}, network {bound.network:.4g}"
        return [
            f"  {'at least a step':<20}{bound.seconds:>12.4g} s ({parts})",
            f"  {'at most':<20}{self.most_per_second:>12,.0f} {self.unit}/s",
            *fits,
        ]
