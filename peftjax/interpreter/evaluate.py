"""Evaluate a jaxpr on values of which some are structured weights."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from peftjax.core import compat
from peftjax.core.errors import PeftError
from peftjax.core.patterns import fullmatches
from peftjax.core.primitives import rule_on_weights
from peftjax.interpreter.arithmetic import sums_of_squares
from peftjax.interpreter.uses import Uses
from peftjax.weights.base import Weight, dense
from peftjax.weights.mixture import Mixture

# A rule takes (equation, operands) and gives the results, or None when the operands' structure would be lost.
# A control rule also takes the evaluator, to run the jaxprs inside it.
EquationRule = Callable[[Any, list[Any]], Any]
ControlRule = Callable[["Evaluator", Any, list[Any]], Sequence[Any] | None]


@dataclass(frozen=True)
class Rules:
    """How equations on weights are evaluated, by the name of the primitive.

    Attributes:
        control: of equations that hold other jaxprs.
        views: of equations whose result is a weight again.
        products: in which a weight meets an activation.
        joins: of several weights, and of views of a mixture; tried last.
    """

    control: Mapping[str, ControlRule]
    views: Mapping[str, EquationRule]
    products: Mapping[str, EquationRule]
    joins: Mapping[str, EquationRule]


@dataclass(frozen=True)
class Evaluator:
    """Runs jaxprs; `allow_dense` names the primitives and parameters that may be densified."""

    rules: Rules
    allow_dense: tuple[str, ...] = ()
    functions: dict[Any, Any] = field(default_factory=dict, compare=False)  # of `call_once_traced`
    uses: Uses = field(default_factory=Uses, compare=False)
    line: str = ""  # the user's, of the innermost equation around those that run

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of the jaxpr for its constants and arguments, in order."""
        env: dict[Any, Any] = dict(zip(compat.inputs_of(jaxpr), values, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if compat.is_literal(atom) else env[atom]

        done: set[int] = set()
        for eqn in jaxpr.eqns:
            if id(eqn) in done:
                continue
            operands = [read(atom) for atom in eqn.invars]
            with compat.at_equation(eqn):
                if lengths := sums_of_squares(jaxpr, eqn, operands):
                    env.update(lengths[0])
                    done |= lengths[1]
                else:
                    env.update(zip(eqn.outvars, self.apply(eqn, operands)))
        return [read(atom) for atom in jaxpr.outvars]

    def call(self, jaxpr: Any) -> Callable[..., list[Any]]:
        """The jaxpr, closed or open, as a function of its arguments."""
        opened, consts = compat.open_jaxpr(jaxpr)
        return lambda *values: self.inside().run(opened, [*consts, *values])

    def inside(self) -> "Evaluator":
        """The evaluator of a jaxpr inside an equation: the same numbers whenever JAX traces it again."""
        return replace(self, uses=Uses(self.uses.depth + 1))

    def apply(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The results of one equation."""
        if not any(isinstance(value, Weight) for value in operands):
            return compat.bind(eqn, operands)
        name, rules = eqn.primitive.name, self.rules
        if control := rule_on_weights(eqn.primitive) or rules.control.get(name):
            around = replace(self, line=self.line_of(eqn))
            results = control(around, eqn, self.uses.told_apart(operands))
        elif rule := rules.views.get(name):
            results = rule(eqn, operands)
        elif rule := rules.products.get(name):
            with compat.context_of(eqn):
                operands = self.uses.told_apart(operands)
                results = rule(eqn, operands)
        else:
            results = None
        if results is None and name in rules.joins and not self.allows(eqn, operands):
            results = rules.joins[name](eqn, operands)
        if results is not None:
            return list(results) if isinstance(results, list | tuple) else [results]
        self.require_allowed(eqn, operands)
        return compat.bind(eqn, [dense(value) for value in operands])

    def trace(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, taking structured weights where it expects arrays; see `peftjax.adapt`."""

        @functools.wraps(fn)
        def adapted(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda n: isinstance(n, Weight))
            if not any(isinstance(leaf, Weight) for leaf in leaves):
                return fn(*args, **kwargs)
            traced = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Weight) or _is_array(leaf)]
            result: list[Any] = []

            def flat(*arrays: jax.Array) -> list[Any]:
                full = list(leaves)
                for n, array in zip(traced, arrays):
                    full[n] = array
                args, kwargs = jax.tree.unflatten(tree, full)
                out, out_tree = jax.tree.flatten(fn(*args, **kwargs))
                result[:] = [out_tree, [None if _is_array(leaf) else leaf for leaf in out]]
                return [leaf for leaf in out if _is_array(leaf)]

            closed = jax.make_jaxpr(flat)(*(_as_type(leaves[n]) for n in traced))
            jaxpr, consts = compat.open_jaxpr(closed)
            outputs = iter(
                replace(self, functions={}, uses=Uses()).run(jaxpr, [*consts, *(leaves[n] for n in traced)])
            )
            out_tree, fixed = result
            return jax.tree.unflatten(out_tree, [_returned(next(outputs)) if f is None else f for f in fixed])

        return adapted

    def line_of(self, eqn: Any) -> str:
        """The user's line of the equation, or of the one around it: what JAX wrote itself has none."""
        return compat.source_line(eqn) or self.line

    def allows(self, eqn: Any, operands: list[Any]) -> bool:
        """Whether the user accepted the dense arrays of all weights in this equation."""
        return all(self._accepts(eqn, value) for value in operands if isinstance(value, Weight))

    def _accepts(self, eqn: Any, weight: Weight) -> bool:
        names = (eqn.primitive.name, weight.layout.name)
        return any(fullmatches(p, name) for p in self.allow_dense for name in names)

    def require_allowed(self, eqn: Any, operands: list[Any]) -> None:
        """Raise the error of strict mode unless the user accepted this primitive or parameter."""
        for weight in (value for value in operands if isinstance(value, Weight)):
            if self._accepts(eqn, weight):
                continue
            line = self.line_of(eqn)
            raise PeftError(
                f"{weight.layout.name}: {eqn.primitive.name!r}{f' at {line}' if line else ''} needs the "
                f"dense array of {_described(weight)}; exclude the parameter from the targets, give the "
                f"right axes as layouts={{{weight.layout.name!r}: ...}}, or accept the cost with "
                f"adapt(fn, allow_dense=[{eqn.primitive.name!r}])"
            )


def _described(weight: Weight) -> str:
    if isinstance(weight, Mixture):
        return (
            f"weights {weight.shape} that a 'dot_general' or a sum over the stack of experts made, read with "
            f"axes {weight.read_as!r}"
        )
    return f"this {type(weight).__name__} {weight.shape}, read with axes {weight.layout.letters!r}"


def _returned(output: Any) -> Any:
    """What the function gives back; raise the error of a misread weight, which is none of its parameters."""
    if isinstance(output, Mixture):
        name = output.layout.name
        raise PeftError(
            f"{name}: the function returns {_described(output)}; give the right axes as "
            f"layouts={{{name!r}: ...}}, or accept the cost with adapt(fn, allow_dense=['dot_general'])"
        )
    return output


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _as_type(leaf: Any) -> Any:
    return leaf.typeof() if isinstance(leaf, Weight) else leaf
