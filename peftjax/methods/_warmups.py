"""The steps between two warm-ups, in which a method changes itself now and then."""

from dataclasses import dataclass

from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError


@dataclass(frozen=True, kw_only=True)
class BetweenWarmups:
    """When something changes.

    Attributes:
        total_steps: T.
        init_warmup: t_i, steps before the first change.
        final_warmup: t_f, steps after the last one.
        every: steps between two changes.
    """

    total_steps: int
    init_warmup: int
    final_warmup: int
    every: int

    def require_valid(self, caller: str, every: str) -> None:
        """Raise a PeftError for a number out of range, or no step between the warm-ups.

        Args:
            caller: the method, for the error.
            every: what its option is called.
        """
        positive(caller, "total_steps", self.total_steps)
        positive(caller, every, self.every)
        at_least(caller, "init_warmup", self.init_warmup, 0)
        at_least(caller, "final_warmup", self.final_warmup, 0)
        if self.init_warmup >= self.last:
            raise PeftError(
                f"{caller}: {self.total_steps} steps leave none between warm-ups of {self.init_warmup} and "
                f"{self.final_warmup}; lower init_warmup or final_warmup"
            )

    @property
    def last(self) -> int:
        """The steps that have been done at the last change."""
        return self.total_steps - self.final_warmup

    def due(self, step: int) -> bool:
        """Whether there is a change after so many steps."""
        between = self.init_warmup < step < self.last and step % self.every == 0
        return between or step == self.last
