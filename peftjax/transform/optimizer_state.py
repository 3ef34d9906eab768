"""The optimizer's state as a method's advance sees it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax

from peftjax.quantize import Codes
from peftjax.transform.around import AroundState
from peftjax.transform.moments import Change, change_moments

Slot = tuple[str, str]
"""A trained array of a method: its parameter's path, and its name among those of this weight."""


@dataclass(frozen=True)
class OptimizerState:
    """The state of any optimizer, and where in it a method finds what belongs to its own trained arrays.

    Attributes:
        state: of the whole optimizer.
        tx: the optimizer, as `Transform.optimizer` gave it.
        trainable: all that it trains as a step begins with it, which `tx.init` is given.
        names: of the chain's parts that lead to the method, outermost first.
    """

    state: Any
    tx: optax.GradientTransformation
    trainable: Any
    names: tuple[str, ...] = ()

    def of_part(self, name: str) -> "OptimizerState":
        """The same state as a chain's part sees it."""
        return replace(self, names=(*self.names, name))

    def place(self, slot: Slot) -> tuple[str, ...]:
        """The way to a trained array of the method in the whole trainable."""
        return (*self.names, *slot)

    def changed(self, changes: Mapping[Slot, Change]) -> "OptimizerState":
        """What belongs to some of the method's trained arrays changed."""
        placed = {self.place(slot): change for slot, change in changes.items()}
        return replace(self, state=change_moments(self.state, placed))

    def after(self) -> Iterator[Any]:
        """The states of the method's own transformation of updates, one for each optimizer that has it."""
        for node in jax.tree.leaves(self.state, is_leaf=lambda node: isinstance(node, AroundState)):
            if isinstance(node, AroundState):
                own = node.after
                for name in self.names:
                    own = own[name]
                yield own

    def restarted(self) -> "OptimizerState":
        """Every part of the state that has arrays of the trained ones' size as at the start of a training.

        Moments and the counts that correct them are reset; schedules of the learning rate go on.
        """
        paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(self.trainable)}

        def mirrors(field: Any) -> bool:
            leaves = jax.tree_util.tree_leaves_with_path(field, is_leaf=lambda n: isinstance(n, Codes))
            return bool(leaves) and all(path in paths for path, _ in leaves)

        def has_moments(node: Any) -> bool:
            return isinstance(node, tuple) and hasattr(node, "_fields") and any(map(mirrors, node))

        def restart(old: Any, new: Any) -> Any:
            return new if has_moments(old) else old

        fresh = self.tx.init(self.trainable)
        return replace(self, state=jax.tree.map(restart, self.state, fresh, is_leaf=has_moments))
