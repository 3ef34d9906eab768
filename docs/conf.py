"""How Sphinx builds these pages; `python -m sphinx -W docs docs/_build`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import generate  # noqa: E402
from docstrings import markdown_to_rst  # noqa: E402

project = "peftjax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
# methods/ holds notes, which the generated pages have in them; structure.md is part of the architecture.
exclude_patterns = ["_build", "methods", "reference/structure.md"]
html_theme = "furo"
html_title = "peftjax"
html_theme_options = {"source_view_link": "", "footer_icons": []}
copybutton_prompt_text = ">>> "

myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False


def setup(app):
    """Write the generated pages first, and read docstrings as Markdown."""
    generate.write_pages(Path(app.srcdir))
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)  # before napoleon, at 500
