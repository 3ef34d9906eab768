"""The README's example runs as it stands."""

import re
from pathlib import Path

import jax


def test_the_example_learns():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example is not None
    names: dict = {}
    exec(example.group(1), names)
    assert float(names["loss"]) < 1.0  # ten classes at random: 2.3
    assert jax.tree.structure(names["dense"]) == jax.tree.structure(names["params"])
