"""Sphinx configuration: ``python -m sphinx -W -b html docs docs/_build``."""

import socket
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

import secorder

project = "secorder"
author = "the secorder maintainers"
copyright = "2026, the secorder maintainers"
release = version = secorder.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "secorder"
html_math_renderer = "mathml"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = True
intersphinx_timeout = 5


def reachable(host: str) -> bool:
    """Whether a host can be asked: where the network is closed, links to PyTorch's documentation are left out."""
    try:
        socket.create_connection((host, 443), timeout=intersphinx_timeout).close()
    except OSError:
        return False
    return True


PYTORCH = "docs.pytorch.org"
intersphinx_mapping = {"torch": (f"https://{PYTORCH}/docs/stable", None)} if reachable(PYTORCH) else {}


def mathml(translator: Any, node: nodes.Element) -> None:
    """A formula as browsers read it by themselves: pages load nothing from elsewhere."""
    if isinstance(node, nodes.math_block):
        formula = convert(node.astext(), display="block")
        translator.body.append(f'<div class="math" style="padding: 0.5em 0">{formula}</div>')
    else:
        translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Enter the renderer of formulas."""
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
