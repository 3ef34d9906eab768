"""The rules of all primitives, in one place."""

from peftjax.interpreter.control import CONTROL
from peftjax.interpreter.evaluate import Rules
from peftjax.interpreter.joins import JOINS
from peftjax.interpreter.products import PRODUCTS
from peftjax.interpreter.views import VIEWS

RULES = Rules(CONTROL, VIEWS, PRODUCTS, JOINS)
