"""Sphinx's configuration. The build reads the sources and nothing else: it needs no network."""

import re

from sphinx.application import Sphinx

from lightning_ppdl import __version__

project = "Lightning PPDL"
copyright = "the Lightning PPDL authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Lightning PPDL {__version__}"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def _escape_stars(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """``(n, *input_shape)`` in a docstring is a shape, not the start of an emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*(?=\w+\))", r"\\*", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _escape_stars)
