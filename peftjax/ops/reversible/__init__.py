"""A stack of layers that keeps its outputs only: backward recomputes every layer's inputs by inverting it.

Two streams `(x1, x2)` of one shape pass through L layers of two functions each,

    y1 = λ x1 + F(x2)        y2 = β x2 + G(y1)        next (x1, x2) = (y1, y2), or (y2, y1) when swapped

    x2 = (y2 - G(y1)) / β    x1 = (y1 - F(x2)) / λ

`reversible` is one equation in a jaxpr, which holds F and G of a layer as jaxprs. Differentiated, it has a
backward pass of its own: the forward scan keeps the last pair of streams (with `every`, the pair after
every `every` layers, counted from the last), the backward scan recomputes F and G of each layer, inverts
them and pulls the cotangents back. Beside those pairs backward reads its own operands and nothing else.
Operands that nothing is differentiated by have no tangent and get no cotangent: none is computed.

`peftjax.adapt` rebuilds the equation with F and G on the parts of structured weights.
"""

from peftjax.ops.reversible.coupling import Coupling, Pair, Plan
from peftjax.ops.reversible.rounding import inverse_errors
from peftjax.ops.reversible.stack import Branch, reversible

__all__ = ["Branch", "Coupling", "Pair", "Plan", "inverse_errors", "reversible"]
